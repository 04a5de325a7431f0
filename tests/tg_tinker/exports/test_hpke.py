"""The post-quantum seal: X-Wing as published, HPKE as anybody computes it, and nothing but the whole file opens."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports import hpke
from tg_tinker.exports.hpke import SLOT_BYTES, START_BYTES, Identity, Recipient, open_hpke, seal_hpke

ROOT = Path(__file__).parents[3]
VECTOR = json.loads((ROOT / "tests" / "golden" / "xwing.json").read_text())
ALICE, BOB, EVE = Identity(b"a" * 32), Identity(b"b" * 32), Identity(b"e" * 32)


def sealed(plain: bytes, *receivers: Identity) -> bytes:
    return b"".join(bytes(p) for p in seal_hpke([r.recipient.text for r in receivers], [plain]))


def opened(data: bytes, *identities: Identity) -> bytes:
    return b"".join(open_hpke([i.text for i in identities], io.BytesIO(data)))


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What the documentation prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/formats/export.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_our_keys_are_those_of_the_published_vector() -> None:
    public = Identity(bytes.fromhex(VECTOR["seed"])).recipient.public_key.hex()
    assert public.startswith(VECTOR["public_key_starts"])
    assert public.endswith(VECTOR["public_key_ends"])
    assert len(public) == 2 * 1216


def test_the_reader_in_the_documentation_knows_the_published_vector_and_opens_our_files(
    printed: dict[str, Any],
) -> None:
    seed, ciphertext = bytes.fromhex(VECTOR["seed"]), bytes.fromhex(VECTOR["ciphertext"])
    assert printed["xwing"](seed, ciphertext).hex() == VECTOR["shared_secret"]
    assert printed["read_export"](ALICE.seed, sealed(b"an archive", ALICE)) == b"an archive"


@pytest.mark.parametrize("size", [0, 1, 2**20 - 100, 3 * 2**20])
def test_every_receiver_opens_what_was_sealed_for_all(size: int) -> None:
    plain = random.Random(size).randbytes(size)
    data = sealed(plain, ALICE, BOB)
    assert opened(data, ALICE) == opened(data, EVE, BOB) == plain
    with pytest.raises(InvalidRequestError, match="not sealed for this identity"):
        opened(data, EVE)


def test_no_bit_of_a_file_can_be_changed_not_even_in_somebody_elses_slot() -> None:
    data = sealed(b"x" * 50, ALICE, BOB)
    wanted = [*range(START_BYTES), *range(START_BYTES, len(data), 7), *range(len(data) - 106, len(data))]
    for position in wanted:
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        with pytest.raises(InvalidRequestError, match="export is refused"):
            opened(bytes(changed), ALICE)


@pytest.mark.parametrize("end", [0, 1, START_BYTES - 1, START_BYTES + SLOT_BYTES - 1, -1, -16, -50])
def test_a_file_that_was_cut_or_continued_is_refused(end: int) -> None:
    data = sealed(b"x" * 50, ALICE)
    for bad in (data[:end], data + b"\0"):
        with pytest.raises(InvalidRequestError, match="export is refused"):
            opened(bad, ALICE)


def test_a_file_that_commits_to_another_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender could otherwise make one file that opens to one thing for one receiver, and to another for another."""
    derive = hpke._keys
    with monkeypatch.context() as patch:
        patch.setattr(hpke, "_keys", lambda key: (derive(key)[0], bytes(32)))
        data = sealed(b"x", ALICE)
    with pytest.raises(InvalidRequestError, match="export is refused"):
        opened(data, ALICE)


def test_a_number_of_slots_that_is_not_there_allocates_nothing() -> None:
    for count in (0, 21, 65535):
        data = bytearray(sealed(b"x", ALICE))
        data[10:12] = count.to_bytes(2, "big")
        with pytest.raises(InvalidRequestError, match="export is refused"):
            opened(bytes(data), ALICE)


def test_keys_are_lines_that_notice_a_slip_of_the_pen() -> None:
    for text, parse in ((ALICE.text, Identity.parse), (ALICE.recipient.text, Recipient.parse)):
        assert parse(f"  {text}\n") in (ALICE, ALICE.recipient)
        slips = (text[:-1], text[:40] + ("A" if text[40] != "A" else "B") + text[41:], text.lower(), "", "age1x")
        for slip in slips:
            with pytest.raises(InvalidRequestError):
                parse(slip)
    with pytest.raises(InvalidRequestError):
        Recipient.parse(ALICE.text)
    assert "a" * 8 not in repr(ALICE)
    assert ALICE.text not in repr(ALICE)


def test_receivers_are_one_to_twenty_and_different() -> None:
    many = [Identity(bytes([i]) * 32).recipient.text for i in range(21)]
    for bad in ([], many, many[:1] * 2):
        with pytest.raises(InvalidRequestError, match="1 to 20"):
            hpke.check_recipients(bad)
    assert len(hpke.check_recipients(many[:20])) == 20


def test_a_public_key_that_is_none_is_refused() -> None:
    broken = Recipient(b"\xff" * 1216)
    with pytest.raises(InvalidRequestError, match="not a key"):
        hpke.check_recipients([broken.text])
