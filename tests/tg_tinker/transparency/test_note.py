"""Keys, notes and checkpoints: exactly what was signed, or an error."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.errors import LogVerificationError
from tg_tinker.transparency.note import Checkpoint, VerifierKey, open_note, origin_of, sign_note

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = VerifierKey.of(PRIVATE.public_key().public_bytes_raw())
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER_KEY = VerifierKey.of(OTHER.public_key().public_bytes_raw())
CHECKPOINT = Checkpoint(KEY.name, 25, hashlib.sha256(b"root").digest())
NOTE = sign_note(CHECKPOINT.body(), KEY, PRIVATE.sign)


def refused(match: str | None = None) -> pytest.RaisesExc[LogVerificationError]:
    return pytest.RaisesExc(LogVerificationError, match=match, check=lambda e: e.kind == "bad_signature")


def signed(body: str) -> str:
    return sign_note(body, KEY, PRIVATE.sign)


def test_the_name_of_a_log_follows_from_its_key() -> None:
    digest = hashlib.sha256(b"tg-tinker/log-id/v1\x00" + KEY.public_key).hexdigest()
    assert KEY.name == origin_of(KEY.public_key) == f"tg-tinker/{digest[:32]}"
    encoded = base64.b64encode(b"\x01" + KEY.public_key).decode()
    assert KEY.text == f"{KEY.name}+{KEY.key_hash.hex()}+{encoded}"
    assert VerifierKey.parse(KEY.text) == KEY != OTHER_KEY


def test_every_flipped_bit_and_every_cut_of_a_key_is_refused() -> None:
    data = KEY.text.encode()
    for i in range(len(data) * 8):
        changed = bytearray(data)
        changed[i // 8] ^= 1 << i % 8
        with refused():
            VerifierKey.parse(changed.decode("latin-1"))
    for end in range(len(data)):
        with refused():
            VerifierKey.parse(data[:end].decode())
    for text in (KEY.text + "\n", KEY.text + "=", " " + KEY.text, KEY.text.replace(KEY.name, ""), "++", ""):
        with refused():
            VerifierKey.parse(text)


def test_a_key_of_another_algorithm_is_refused_whatever_its_hash() -> None:
    typed = b"\x02" + KEY.public_key
    hashed = hashlib.sha256(KEY.name.encode() + b"\n" + typed).hexdigest()[:8]
    with refused("not of Ed25519"):
        VerifierKey.parse(f"{KEY.name}+{hashed}+{base64.b64encode(typed).decode()}")


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u00a0b", "a\nb", "a\x07"])
def test_a_name_that_could_not_be_told_from_its_line_is_refused(name: str) -> None:
    with refused():
        VerifierKey(name, KEY.public_key)


def test_a_checkpoint_comes_back_as_it_was_signed() -> None:
    assert Checkpoint.open(NOTE, KEY) == CHECKPOINT
    assert NOTE.startswith(f"{KEY.name}\n25\n")
    assert NOTE.splitlines()[4].startswith(f"— {KEY.name} ")


def test_every_flipped_bit_and_every_cut_of_a_checkpoint_is_refused() -> None:
    data = NOTE.encode()
    for i in range(len(data) * 8):
        changed = bytearray(data)
        changed[i // 8] ^= 1 << i % 8
        with refused():
            Checkpoint.open(changed.decode(errors="surrogateescape"), KEY)
    for end in range(len(data)):
        with refused():
            Checkpoint.open(data[:end].decode(errors="surrogateescape"), KEY)
    for text in (NOTE + "\n", "\n" + NOTE, NOTE.replace("\n", "\r\n"), NOTE + "x\n", NOTE[:-1], NOTE + NOTE):
        with refused():
            Checkpoint.open(text, KEY)


def test_another_keys_checkpoint_is_refused() -> None:
    with refused("no signature of"):
        Checkpoint.open(NOTE, OTHER_KEY)
    forged = sign_note(CHECKPOINT.body(), KEY, OTHER.sign)  # our name, their key
    with refused("the note was altered"):
        Checkpoint.open(forged, KEY)
    with refused("of another log"):
        Checkpoint.open(sign_note(CHECKPOINT.body(), OTHER_KEY, OTHER.sign), OTHER_KEY)


def test_a_witness_may_sign_beside_the_log() -> None:
    witness = sign_note(CHECKPOINT.body(), OTHER_KEY, OTHER.sign).splitlines(keepends=True)[-1]
    assert (
        Checkpoint.open(NOTE + witness, KEY) == CHECKPOINT == Checkpoint.open(NOTE + NOTE.splitlines(True)[-1], KEY)
    )


def test_one_false_signature_of_the_log_spoils_a_good_one() -> None:
    false = sign_note("something else\n", KEY, PRIVATE.sign).splitlines(keepends=True)[-1]
    with refused("altered"):
        Checkpoint.open(NOTE + false, KEY)


def test_a_body_with_an_empty_line_is_split_at_the_last_one() -> None:
    body = "first\n\n— not a signature\n\nlast\n"
    assert open_note(signed(body), KEY) == body


def test_lines_after_the_third_of_a_checkpoint_are_passed_over() -> None:
    assert Checkpoint.open(signed(CHECKPOINT.body() + "later 1\n"), KEY) == CHECKPOINT


@pytest.mark.parametrize(
    "body",
    [
        f"{KEY.name}\n25\n",
        f"{KEY.name}\n025\n{CHECKPOINT.body().splitlines()[2]}\n",
        f"{KEY.name}\n-1\n{CHECKPOINT.body().splitlines()[2]}\n",
        f"{KEY.name}\n٢٥\n{CHECKPOINT.body().splitlines()[2]}\n",
        f"{KEY.name}\n9223372036854775808\n{CHECKPOINT.body().splitlines()[2]}\n",
        f"{KEY.name}\n{'9' * 5000}\n{CHECKPOINT.body().splitlines()[2]}\n",
        f"{KEY.name}\n25\nAAAA\n",
        f"{KEY.name}\n25\n!\n",
        CHECKPOINT.body() + "\n",
        "\n" + CHECKPOINT.body(),
        "hello\n",
    ],
)
def test_a_signed_body_that_is_no_checkpoint_is_refused(body: str) -> None:
    assert open_note(signed(body), KEY) == body
    with refused():
        Checkpoint.open(signed(body), KEY)


@pytest.mark.parametrize("body", ["no newline", "tab\there\n", "null\x00\n", "half \ud800\n", "x" * 1_000_001 + "\n"])
def test_what_a_note_cannot_hold_is_not_signed(body: str) -> None:
    with refused():
        signed(body)


def test_a_note_of_very_many_signatures_is_refused_before_any_is_checked() -> None:
    with refused("more than 100"):
        open_note(NOTE + NOTE.splitlines(keepends=True)[-1] * 100, KEY)
