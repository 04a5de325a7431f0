"""Shamir's secret sharing (1979) of 32-byte secrets: any t shares give the secret, fewer say nothing about it.

The field is the integers modulo the smallest prime above 2^256, so that every 32-byte value is one of its elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
COEFFICIENT_BYTES = 64
"""Random bytes behind one coefficient: reduced modulo the prime they are uniform up to 2^-255."""


def split(secret: bytes, points: Iterable[int], *, threshold: int, randomness: bytes) -> dict[int, bytes]:
    """Shares by point: values of a random polynomial of degree ``threshold - 1`` whose value at 0 is the secret.

    Args:
        secret: 32 bytes.
        points: distinct, from 1.
        randomness: ``COEFFICIENT_BYTES`` for each coefficient but the first; secret and used for nothing else.
    """
    if len(secret) != SECRET_BYTES or len(randomness) != COEFFICIENT_BYTES * (threshold - 1):
        raise ValueError("a secret of 32 bytes and 64 random bytes for each coefficient above the first are needed")
    coefficients = [int.from_bytes(secret, "big")] + [
        int.from_bytes(randomness[i : i + COEFFICIENT_BYTES], "big") % PRIME
        for i in range(0, len(randomness), COEFFICIENT_BYTES)
    ]
    return {point: _value(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in points}


def combine(shares: Mapping[int, bytes], *, at: int = 0) -> int:
    """The value at ``at`` of the lowest polynomial through the shares (Lagrange): the secret at 0.

    It is the secret only if there are enough shares and all are true; whoever calls checks the value against a public
    key or a commitment.
    """
    total = 0
    for point, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != point:
                numerator = numerator * (at - other) % PRIME
                denominator = denominator * (point - other) % PRIME
        total += int.from_bytes(share, "big") * numerator * pow(denominator, -1, PRIME)
    return total % PRIME


def _value(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value
