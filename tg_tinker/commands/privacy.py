"""`tg-tinker privacy`: planning budgets, with no server and no network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tg_tinker.commands.plugins import COMMANDS, PluginGroup
from tg_tinker.errors import TGTinkerError

if TYPE_CHECKING:
    from tg_tinker.privacy.curves import Curve
    from tg_tinker.privacy.plans import Plan

_positive = click.FloatRange(min=0, min_open=True)
_count = click.IntRange(min=1)
_WIDTH = 64  # characters of the plot, beside its axis; 80 columns hold both


@click.group(cls=PluginGroup, plugins=f"{COMMANDS}.privacy", modules={"report": "tg_tinker.commands.report:report"})
def privacy() -> None:
    """Planning and reporting budgets."""


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option("--epsilon", type=_positive, help="Target epsilon."),
            click.option(
                "--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Default: 1 / (2 N)."
            ),
            click.option("--noise-multiplier", type=_positive, help="Noise over sensitivity, sigma."),
            click.option("--steps", type=_count, help="Noised steps."),
            click.option("--batch-size", type=_count, help="Expected privacy units in a step."),
            click.option("--dataset-size", type=_count, help="Privacy units, N."),
            click.option(
                "--sampling",
                type=click.Choice(["poisson", "none", "max_participation"]),
                default="poisson",
                show_default=True,
                help="How batches are drawn; only Poisson sampling amplifies.",
            ),
            click.option("--participations", type=_count, help="Most steps of one unit, for max_participation."),
            click.option(
                "--accountant",
                type=click.Choice(["rdp", "prv"]),
                default="rdp",
                show_default=True,
                help="Solve by the gate, or, for a schedule fixed in advance, by PRV.",
            ),
        ]
    ):
        command = option(command)
    return command


@privacy.command("plan")
@_options
@click.option("--svg", "svg_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the plot here, too.")
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON, and nothing else.")
def plan(svg_file: Path | None, as_json: bool, **given: Any) -> None:
    """Leave out one of epsilon, noise, steps, batch and dataset size; it is computed from the others.

    The answer is rounded to the safe side: put back, it keeps the target under the gate.
    """
    from tg_tinker import privacy as planning
    from tg_tinker.privacy.plots import svg_chart, text_chart

    try:
        found = planning.plan(**given)
        curves = [] if as_json and svg_file is None else _curves(found)
        if svg_file is not None:
            svg_file.write_text(svg_chart(curves, target=found.target_epsilon, delta=found.delta), encoding="utf-8")
        if as_json:
            click.echo(json.dumps(found.to_json(), indent=2))
            return
        click.echo(_table(found))
    except TGTinkerError as e:
        raise click.ClickException(_in_options(e.message)) from e
    except OSError as e:
        raise click.ClickException(f"{svg_file} cannot be written: {e.strerror}") from e
    if curves:
        click.echo("\nepsilon\n" + text_chart(curves, target=found.target_epsilon, width=_WIDTH))
    if svg_file is not None:
        click.echo(f"\nthe plot is in {svg_file}")


def _curves(found: Plan) -> list[Curve]:
    from tg_tinker.privacy.plans import available

    return [curve for name in available() if (curve := found.curve(name)).points]


def up(value: float, digits: int = 4) -> str:
    """A bound as text that is never below it.

    >>> up(7.99801155), up(0.000012), up(1234567.81)
    ('7.9981', '1.2e-05', '1234568')
    """
    if value == 0:
        return "0"
    if value < 10.0 ** (1 - digits):
        text = f"{value:.1e}"
        return text if float(text) >= value else f"{float(text) + 10.0 ** (math.floor(math.log10(value)) - 1):.1e}"
    digits = digits if value < 1000 else 0
    rounded = math.ceil(value * 10**digits) / 10**digits
    return f"{rounded:.{digits}f}"


def _table(found: Plan) -> str:
    """The plan, then epsilon by every accountant that can say; plain text of at most 80 columns."""
    from tg_tinker.privacy.plans import ACCOUNTANTS, available

    rows: list[tuple[str, str]] = [
        ("noise_multiplier", f"{found.noise_multiplier:.4f}"),
        ("steps", f"{found.steps}"),
        ("epsilon", up(found.epsilon)),
        ("delta", f"{found.delta:.3g}"),
    ]
    if found.batch_size is not None:
        rows.insert(2, ("batch_size", f"{found.batch_size}"))
    if found.dataset_size is not None:
        rows.insert(3 if found.batch_size is not None else 2, ("dataset_size", f"{found.dataset_size}"))
    if found.sampling == "poisson":
        rows.append(("sampling", f"poisson, rate {found.sample_rate:.3g}"))
    elif found.sampling == "max_participation":
        rows.append(("sampling", f"max_participation, {found.participations} of one unit"))
    else:
        rows.append(("sampling", "none: nothing is amplified"))
    lines = [f"{name:<17} {value}{'   <- solved' if name == found.solved else ''}" for name, value in rows]
    lines += ["", f"{'accountant':<11} {'epsilon':>10}"]
    for name in available():
        value = found.epsilon_by(name)
        if value is not None:
            lines.append(f"{name:<11} {up(value):>10}   {ACCOUNTANTS[name]}")
    return "\n".join(lines)


def _in_options(message: str) -> str:
    """The message with arguments spelled as options."""
    for name in ("noise_multiplier", "batch_size", "dataset_size"):
        message = message.replace(name, f"--{name.replace('_', '-')}")
    return message
