"""What an audit says in a terminal, for people who must decide something."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tg_tinker_server.empirical.findings import AuditResult, Finding
from tg_tinker_server.empirical.settings import AuditSettings

_TITLES = {
    "neighbours": "1. Neighbours: how far the clipped sum moves when one unit is left out, over C (at most 1)",
    "noise": "2. Noise: tests of what was added to the sums, against what the ledger charged for",
    "draws": "3. Draws: tests of the batches that the server drew from a registered dataset",
    "distinguisher": "4. Distinguisher: what guessing who was in the data proves",
    "charges": "5. Charges: what the audit's own runs cost at least, over what the ledger charged (at most 1)",
}


def introduce(console: Console, settings: AuditSettings) -> None:
    """What is about to happen."""
    console.print(
        f"Auditing the {settings.backend} engine of this installation on {settings.model}: {settings.canaries} "
        + ("canaries as planted gradients" if settings.mode == "gradient" else "canaries as records")
        + f", each in the data with probability 1/2; epsilon {settings.epsilon:g} at delta {settings.delta:g}.",
        highlight=False,
    )


def conclude(console: Console, result: AuditResult) -> None:
    """Instrument by instrument, then the bound beside the claim, the power, and the verdict."""
    for instrument, title in _TITLES.items():
        findings = [f for f in result.findings if f.instrument == instrument]
        console.print(f"\n[bold]{title}[/bold]", highlight=False)
        if instrument == "distinguisher":
            _bound(console, result)
        else:
            console.print(_table(findings, chances=instrument in ("noise", "draws")))
    _verdict(console, result)


def _table(findings: list[Finding], *, chances: bool) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("", width=5)
    table.add_column("")
    table.add_column("figure", justify="right")
    if chances:
        table.add_column("p", justify="right")
    table.add_column("")
    for finding in findings:
        state = "[bold red]ALARM[/bold red]" if finding.alarm else "ok"
        cells = [state, finding.name, f"{finding.figure:.{4 if chances else 6}g}"]
        if chances:
            cells.append(f"{finding.p_value:.2g}")
        table.add_row(*cells, _word(finding))
    return table


def _word(finding: Finding) -> str:
    return finding.note.split(":")[0] if finding.note else ""


def _bound(console: Console, result: AuditResult) -> None:
    bound, claim = result.bound, result.claim
    lines = [
        f"  proved by this run    epsilon >= {bound.epsilon:.2f}   at {bound.confidence:.0%} confidence, delta "
        f"{claim.delta:g}: {bound.best.correct} of {bound.best.guesses} guesses right",
        f"  claimed by the ledger epsilon <= {claim.epsilon:.2f}   {claim.steps} steps at noise multiplier "
        f"{claim.noise_multiplier:.3f}",
        f"  power                 no number above {bound.power:.2f} could have come out of {result.canaries} "
        f"canaries ({result.power_of_one_count:.2f} had all been guessed and nothing else been tried)",
    ]
    if bound.power <= claim.epsilon:
        lines.append(
            "  This instrument could not have raised an alarm: its power is below the claim. Take more canaries or a "
            "smaller epsilon."
        )
    console.print("\n".join(lines), highlight=False)


def _verdict(console: Console, result: AuditResult) -> None:
    alarms = result.alarms
    if alarms:
        console.print(
            f"\n[bold red]ALARM[/bold red]: {len(alarms)} of {len(result.findings)} findings contradict the claimed "
            "privacy. Do not hand out models of this installation.",
            highlight=False,
        )
        return
    console.print(
        f"\n[bold]No alarm[/bold] in {len(result.findings)} findings, in {result.seconds:.0f} s. An honest service "
        f"raises one with probability at most {result.false_alarm_rate:g}. This is evidence, not proof: a fault that "
        "none of the instruments looks at stays unseen.",
        highlight=False,
    )
