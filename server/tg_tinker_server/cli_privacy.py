"""`tg-tinker privacy plan`: any one unknown among noise, epsilon and steps from the others, with no server."""

from __future__ import annotations

import math

import click

from tg_tinker.errors import TGTinkerError
from tg_tinker_server.dp.accounting import pld_epsilon, prv_epsilon, zero
from tg_tinker_server.dp.calibration import epsilon_for, noise_multiplier_for, step_event, steps_remaining


@click.group()
def privacy() -> None:
    """Planning budgets; needs no server and no network."""


@privacy.command("plan")
@click.option("--epsilon", type=click.FloatRange(min=0, min_open=True), help="Target epsilon.")
@click.option("--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Default: 1 / (2 N).")
@click.option("--dataset-size", type=click.IntRange(min=1), required=True, help="Privacy units, N.")
@click.option("--batch-size", type=click.IntRange(min=1), required=True, help="Expected units of a step.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps.")
@click.option("--noise-multiplier", type=click.FloatRange(min=0, min_open=True), help="Noise over sensitivity.")
def plan(
    epsilon: float | None,
    delta: float | None,
    dataset_size: int,
    batch_size: int,
    steps: int | None,
    noise_multiplier: float | None,
) -> None:
    """Give two of --epsilon, --steps, --noise-multiplier; the third is computed (Poisson sampling)."""
    if [epsilon, steps, noise_multiplier].count(None) != 1:
        raise click.UsageError("give exactly two of --epsilon, --steps, --noise-multiplier")
    if batch_size > dataset_size:
        raise click.UsageError("--batch-size is larger than --dataset-size")
    rate, delta = batch_size / dataset_size, delta or 1 / (2 * dataset_size)
    try:
        if noise_multiplier is None:
            assert epsilon is not None
            assert steps is not None
            solved = noise_multiplier_for(target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps)
            noise_multiplier = math.ceil(solved * 1e4) / 1e4  # what is shown must keep the target, too
        event = step_event(noise_multiplier, rate)
        if steps is None:
            assert epsilon is not None
            steps = steps_remaining(zero(), event, target_epsilon=epsilon, delta=delta)
    except TGTinkerError as e:
        raise click.ClickException(e.message) from e
    if steps == 0:
        raise click.ClickException("not one step fits; take more noise, a larger dataset or a larger epsilon")
    rdp = epsilon_for(noise_multiplier=noise_multiplier, target_delta=delta, sample_rate=rate, steps=steps)
    click.echo(
        f"noise_multiplier {noise_multiplier:.4f}   steps {steps}   sampling rate {rate:.3g}   delta {delta:.3g}"
    )
    click.echo(f"epsilon {rdp:.4f}   (rdp, the gate)")
    tighter = {
        "prv, for a schedule fixed in advance": prv_epsilon(noise_multiplier, rate, steps, delta),
        "pld, dp_accounting": pld_epsilon([event] * steps, delta),
    }
    for name, value in tighter.items():
        if math.isfinite(value):  # otherwise its grid would be too large
            click.echo(f"epsilon {value:.4f}   ({name})")
