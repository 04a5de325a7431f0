"""Shamir's shares: t give the secret, t - 1 fit every secret alike."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.federated.masking.recovery import recover
from tg_tinker.federated.masking.shamir import COEFFICIENT_BYTES, PRIME, combine, split

SECRETS = st.binary(min_size=32, max_size=32)


def deal(secret: bytes, count: int, threshold: int) -> dict[int, bytes]:
    randomness = secrets.token_bytes(COEFFICIENT_BYTES * (threshold - 1))
    return split(secret, range(1, count + 1), threshold=threshold, randomness=randomness)


def probably_prime(n: int) -> bool:
    """Miller and Rabin, 40 bases."""
    d, r = n - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for base in range(2, 42):
        x = pow(base, d, n)
        if x in (1, n - 1):
            continue
        for _ in range(r - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_the_modulus_is_the_smallest_prime_above_every_secret() -> None:
    assert PRIME > 2**256
    assert probably_prime(PRIME)
    assert not any(probably_prime(n) for n in range(2**256 + 1, PRIME))


@given(secret=SECRETS, data=st.data())
def test_any_threshold_of_the_shares_gives_the_secret(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 12))
    threshold = data.draw(st.integers(2, count))
    shares = deal(secret, count, threshold)
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert combine({p: shares[p] for p in chosen}) == int.from_bytes(secret, "big")
    assert all(combine({p: shares[p] for p in chosen}, at=p) == int.from_bytes(shares[p], "big") for p in shares)


@given(secret=SECRETS, other=SECRETS)
def test_one_share_fewer_fits_any_other_secret_as_well(secret: bytes, other: bytes) -> None:
    shares = deal(secret, 5, 4)
    held = {p: shares[p] for p in (1, 2, 3)}
    through = {0: b"\0" + other, **held}
    polynomial = {p: combine(through, at=p).to_bytes(33, "big") for p in range(1, 6)}
    assert combine({p: polynomial[p] for p in (2, 3, 4, 5)}) == int.from_bytes(other, "big")
    assert {p: polynomial[p] for p in held} == held


def test_a_known_polynomial() -> None:
    """7 + 5 x + 3 x^2, by hand."""
    randomness = (5).to_bytes(64, "big") + (3 + PRIME).to_bytes(64, "big")
    shares = split((7).to_bytes(32, "big"), [1, 2, 10], threshold=3, randomness=randomness)
    assert {p: int.from_bytes(s, "big") for p, s in shares.items()} == {1: 15, 2: 29, 10: 357}
    assert combine(shares) == 7


def test_the_largest_secret_survives() -> None:
    assert combine({p: s for p, s in deal(b"\xff" * 32, 3, 2).items() if p > 1}) == 2**256 - 1


@pytest.mark.parametrize(("secret", "size"), [(b"short", 64), (bytes(32), 63), (bytes(32), 128)])
def test_wrong_sizes_are_programming_errors(secret: bytes, size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        split(secret, [1, 2], threshold=2, randomness=bytes(size))


class TestRecovery:
    secret = bytes(range(32))

    def shares(self, wrong: set[int], count: int = 7, threshold: int = 4) -> dict[int, bytes]:
        shares = deal(self.secret, count, threshold)
        return {p: (b"\0" + secrets.token_bytes(32) if p in wrong else s) for p, s in shares.items()}

    def fits(self, value: bytes) -> bool:
        return value == self.secret

    @pytest.mark.parametrize("liar", range(1, 8))
    def test_one_wrong_share_is_borne_and_found(self, liar: int) -> None:
        assert recover(self.shares({liar}), threshold=4, fits=self.fits) == (self.secret, [liar])

    def test_none_is_wrong(self) -> None:
        assert recover(self.shares(set()), threshold=4, fits=self.fits) == (self.secret, [])

    def test_with_no_share_to_spare_a_wrong_one_is_only_noticed(self) -> None:
        assert recover(self.shares({2}, count=4), threshold=4, fits=self.fits) is None

    def test_too_few_shares(self) -> None:
        few = dict(list(self.shares(set()).items())[:3])
        assert recover(few, threshold=4, fits=lambda _: True) is None

    def test_a_value_that_is_no_secret(self) -> None:
        """The field has 297 elements above the largest secret."""
        shares = {p: (2**256 + 5).to_bytes(33, "big") for p in (1, 2, 3)}
        assert recover(shares, threshold=2, fits=lambda _: True) is None
