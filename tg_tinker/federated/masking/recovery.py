"""A secret from shares of which some may be wrong: tried against what its owner showed of it beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tg_tinker.federated.masking import shamir

Fits = Callable[[bytes], bool]


def recover(shares: Mapping[int, bytes], *, threshold: int, fits: Fits) -> tuple[bytes, list[int]] | None:
    """The secret that ``fits``, and the points whose shares are wrong; ``None`` if it is not found.

    Takes each run of ``threshold`` neighbours around the circle of points in turn. One wrong share among
    ``threshold + 1`` is borne, and more while they leave such a run whole. A wrong share is the fault of whoever gave
    it back, or of the secret's owner who dealt it so; which of them cannot be told.
    """
    points = sorted(shares)
    for start in range(len(points)):
        chosen = {p: shares[p] for p in (points[start:] + points[:start])[:threshold]}
        value = shamir.combine(chosen)
        if len(chosen) < threshold or value >= 2 ** (8 * shamir.SECRET_BYTES):
            continue
        secret = value.to_bytes(shamir.SECRET_BYTES, "big")
        if fits(secret):
            rest = (p for p in points if p not in chosen)
            wrong = [p for p in rest if shamir.combine(chosen, at=p) != int.from_bytes(shares[p], "big")]
            return secret, wrong
    return None
