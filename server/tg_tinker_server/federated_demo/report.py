"""federated-report.html: one self-contained page from what the demo found, pure text from values."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template

from tg_tinker.reports.charts import Chart, line_chart
from tg_tinker_server.demo.report import small, style, up
from tg_tinker_server.federated_demo.findings import Findings, Row, SiteFacts
from tg_tinker_server.federated_demo.state import Arm, Point


def render(found: Findings) -> str:
    """The whole page."""
    settings = found.settings
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    records = sum(site.records for site in found.sites)
    return template.substitute(
        style=style(),
        lead=escape(
            f"A LoRA adapter on {settings.model_ref}, trained in {settings.rounds} rounds by {len(found.sites)} "
            f"sites with {records:,} records in all; each took {settings.steps} steps of DP-SGD on its own server. "
            f"{found.source}."
        ),
        figures=_figures(found),
        chart=line_chart(_chart(found)),
        local_steps=settings.local_steps,
        rows="\n".join(map(_row, found.rows())),
        verdict=escape(found.verdict()),
        sites="\n".join(map(_site, found.sites)),
        promise=_facts(_promise(found)),
        trust="\n".join(f"<li>{escape(line)}</li>" for line in _trust(found)),
        facts=_facts(_artifact(found)),
        footer=escape(
            f"Written by tg-tinker federated demo on {found.made}, run "
            f"{'in one process' if found.in_process else 'as processes'}. Nothing here is fetched from elsewhere."
        ),
    )


def _figures(found: Findings) -> str:
    settings = found.settings
    epsilons = [site.epsilon for site in found.sites]
    shown = [
        (f"{found.before:.0f} → {found.federated:.0f}", "perplexity on public held-out texts"),
        (f"{found.alone:.0f}", "what a site alone reaches, on average"),
        (f"{found.pooled.perplexity:.0f}", "with all records in one place"),
        (
            f"{max(epsilons, key=float)} of {settings.target_epsilon:g}",
            f"largest epsilon of a site, at delta {small(settings.target_delta)}",
        ),
    ]
    return "\n".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in shown
    )


def _chart(found: Findings) -> Chart:
    def line(points: Iterable[Point]) -> list[tuple[float, float]]:
        return [(0, found.before), *((point.step, point.perplexity) for point in points)]

    def of(kind: str, arm: Arm) -> tuple[str, list[tuple[float, float]]]:
        return kind, line(arm.points)

    return Chart(
        label=(
            f"Held-out perplexity by step: federation {found.federated:.1f}, a site alone {found.alone:.1f}, "
            f"pooled {found.pooled.perplexity:.1f}"
        ),
        x_name="step",
        y_name="perplexity",
        line=line(found.history),
        others=[*(of("alone", arm) for arm in found.arms.values()), of("pooled", found.pooled)],
        log=True,
        width=860,
        height=320,
    )


def _row(row: Row) -> str:
    kind = ' class="best"' if row.name == "federation" else ""
    epsilon = "–" if row.epsilon is None else f"{up(row.epsilon)}{row.remark}"
    return f"<tr{kind}><th>{escape(row.name)}</th><td>{row.perplexity:.1f}</td><td>{escape(epsilon)}</td></tr>"


def _site(site: SiteFacts) -> str:
    mark = '<span class="good">✓</span>' if site.checked else '<span class="bad">✗ NOT SO</span>'
    cells = [
        f"{site.records:,}",
        f"{escape(site.epsilon)} {mark}",
        escape(site.noise_multiplier),
        f"{site.steps}, {float(site.sample_rate):.5f}",
        str(site.rounds),
    ]
    return f"<tr><th>{escape(site.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _promise(found: Findings) -> list[tuple[str, str]]:
    return [
        ("over all sites", found.coordinator_promise()),
        ("unit", "one record at one site; neighbouring datasets differ by adding or removing one"),
        ("at each site", "DP-SGD: the server draws a Poisson batch, clips each record, charges, then adds noise"),
        ("what the coordinator sees", "noised updates, who took part; no loss, no norm, no count of records"),
    ]


def _trust(found: Findings) -> Iterable[str]:
    trust = found.result.trust
    yield "Each site trusts its own tg-tinker server, which has its records, and nobody else with them."
    if trust["coordinator_sees_updates"]:
        yield (
            "The coordinator sees each site's noised update. What that tells about one record is bounded by "
            "that site's epsilon. With masking it would see the sum alone."
        )
    yield "Flower carries messages and is trusted with none: each is signed, to one site, in one round of one job."
    yield "A site does what its own policy file allows, and runs no code that a coordinator sends."
    yield (
        f"A poisoned update would be {'borne' if trust['poisoned_updates_borne'] else 'averaged in'}: this job uses "
        f"{found.result.job.strategy.name}."
    )


def _artifact(found: Findings) -> list[tuple[str, str]]:
    artifact = found.artifact
    verdict = f"✓ perplexity {found.reopened:.1f}, as released" if found.reopened_equal else "✗ ANOTHER PERPLEXITY"
    return [
        ("artifact", artifact.artifact_id),
        ("encryption", f"{artifact.algorithm}, key {artifact.key_id}, {artifact.size_bytes:,} bytes"),
        ("opened again", verdict),
        ("weights", found.result.weights_digest),
        ("job", found.result.job_digest),
        (
            "signed report",
            f"{found.report.report}, which passed {len(found.report.verdicts)} checks: each site's own",
        ),
        ("", "signed statement, this job, who took part, and every figure computed again"),
        ("check it", f"tg-tinker {found.verify_arguments}"),
    ]


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"<tr><th>{escape(name)}</th><td>{_value(value)}</td></tr>" for name, value in facts)


def _value(value: str) -> str:
    text = escape(value)
    if value.startswith("✓"):
        return f'<span class="good">{text}</span>'
    if value.startswith("✗"):
        return f'<span class="bad">{text}</span>'
    return f"<code>{text}</code>" if " " not in value and len(value) > 30 else text
