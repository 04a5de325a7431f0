"""What a plan is asked must make sense before it is solved: one unknown, and values in range."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy.plans import Sampling, Unknown

MANY_STEPS = 10_000_000
LARGEST_DATASET = 10**12


def check_choices(accountant: str, sampling: str, participations: int | None) -> None:
    """Refuse names and combinations that do not exist."""
    if accountant not in ("rdp", "prv"):
        raise InvalidRequestError(
            f"a plan is solved by 'rdp' or 'prv', not {accountant!r}; the others stand beside it in the result",
            field="accountant",
            constraint="rdp or prv",
        )
    if sampling not in ("poisson", "none", "max_participation"):
        raise InvalidRequestError(
            f"sampling is 'poisson', 'none' or 'max_participation', not {sampling!r}",
            field="sampling",
            constraint="poisson, none or max_participation",
        )
    if participations is not None and (sampling != "max_participation" or participations < 1):
        raise InvalidRequestError(
            "participations are a positive number, and count only under sampling='max_participation'",
            field="participations",
            constraint=">= 1, with sampling='max_participation'",
        )


def the_unknown(given: Mapping[str, float | int | None], sampling: Sampling, participations: int | None) -> Unknown:
    """The one name without a value among those that matter."""
    matter = ["noise_multiplier", "epsilon", "steps"]
    sizes = sampling == "poisson" or (sampling == "max_participation" and participations is None)
    if sizes:
        matter += ["batch_size", "dataset_size"]
    missing = [name for name in matter if given[name] is None]
    if len(missing) != 1:
        rule = f"give all but one of {', '.join(matter)}"
        lacks = f"missing: {', '.join(missing)}" if missing else "none is missing"
        raise InvalidRequestError(f"{rule}; {lacks}", field=missing[0] if missing else matter[0], constraint=rule)
    found: Unknown = missing[0]  # type: ignore[assignment]  # one of the names above
    return found


def check_ranges(
    *,
    noise_multiplier: float | None,
    epsilon: float | None,
    steps: int | None,
    batch_size: int | None,
    dataset_size: int | None,
) -> None:
    """Refuse values that no plan can have."""
    for name, real in (("noise_multiplier", noise_multiplier), ("epsilon", epsilon)):
        if real is not None and not (real > 0 and math.isfinite(real)):
            raise InvalidRequestError(f"{name} must be positive and finite, got {real}", field=name, constraint="> 0")
    limits = {"steps": MANY_STEPS, "batch_size": LARGEST_DATASET, "dataset_size": LARGEST_DATASET}
    for name, count in (("steps", steps), ("batch_size", batch_size), ("dataset_size", dataset_size)):
        if count is not None and not (isinstance(count, int) and 1 <= count <= limits[name]):
            raise InvalidRequestError(
                f"{name} must be a whole number from 1 to {limits[name]}, got {count}",
                field=name,
                constraint=f"1 to {limits[name]}",
            )
    if batch_size is not None and dataset_size is not None and batch_size > dataset_size:
        raise InvalidRequestError(
            f"batch_size {batch_size} is larger than dataset_size {dataset_size}",
            field="batch_size",
            constraint="<= dataset_size",
        )


def delta_or_default(delta: float | None, dataset_size: int | None) -> float:
    """Delta, by default 1 / (2 ``dataset_size``)."""
    if delta is None:
        if dataset_size is None:
            raise InvalidRequestError(
                "give delta, which is 1 / (2 dataset_size) only where the dataset size is known",
                field="delta",
                constraint="given, or dataset_size is",
            )
        return 1.0 / (2 * dataset_size)
    if not 0 < delta < 1:
        raise InvalidRequestError(
            f"delta must lie strictly between 0 and 1, got {delta}", field="delta", constraint="0 < delta < 1"
        )
    return delta


def check_delta(delta: float, dataset_size: int | None, *, solved: bool = False) -> None:
    """Refuse a delta that would allow publishing a whole unit of a dataset of this size, as the server does."""
    if dataset_size is None or delta < 1 / dataset_size:
        return
    needs = "the target needs a dataset of at least" if solved else "dataset_size is"
    raise InvalidRequestError(
        f"{needs} {dataset_size} units, and delta {delta:g} is not below 1 / {dataset_size} = "
        f"{1 / dataset_size:.3g}: such a promise allows publishing a whole unit. Take "
        + ("more noise, fewer steps, a smaller batch or a larger epsilon" if solved else "a smaller delta"),
        field="delta",
        constraint=f"< {1 / dataset_size:.6g}",
    )
