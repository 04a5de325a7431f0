"""Signed notes and checkpoints: how a log says, with its signature, what it holds.

C2SP signed-note (c2sp.org/signed-note) with Ed25519, and C2SP tlog-checkpoint (c2sp.org/tlog-checkpoint). The
name of a log of ours follows from its public key, so that nobody can take the name without the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tg_tinker.errors import LogVerificationError
from tg_tinker.transparency._encoding import from_base64, to_base64
from tg_tinker.transparency.merkle import HASH_BYTES, MAX_SIZE

LOG_ID_DOMAIN = b"tg-tinker/log-id/v1\x00"
ORIGIN_PREFIX = "tg-tinker/"
_ED25519 = b"\x01"  # C2SP's number of the algorithm
_KEY_HASH_BYTES = 4
_MAX_SIGNATURES = 100  # as Go's note package: a note is parsed before anything in it is trusted
_MAX_NOTE = 1_000_000  # characters

Sign = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """An Ed25519 public key with its name, as a C2SP verifier key.

    Attributes:
        name: without spaces and plus signs.
        public_key: 32 bytes.

    Raises:
        LogVerificationError: kind ``"bad_signature"``: not a key.
    """

    name: str
    public_key: bytes

    def __post_init__(self) -> None:
        if not self.name or "+" in self.name or any(c.isspace() or not c.isprintable() for c in self.name):
            raise _bad("a verifier key has no name, or one with a space or a plus sign")
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key)
        except ValueError as e:
            raise _bad("a verifier key is not an Ed25519 public key of 32 bytes") from e

    @classmethod
    def of(cls, public_key: bytes) -> Self:
        """The key of one of our logs, under the name that follows from it."""
        return cls(origin_of(public_key), public_key)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``<name>+<8 hex digits>+<base64>``.

        Raises:
            LogVerificationError: kind ``"bad_signature"``: another form, another algorithm, or a key hash that does
                not fit.
        """
        name, _, rest = text.partition("+")
        digits, _, encoded = rest.partition("+")
        try:
            typed = from_base64(encoded)
        except ValueError as e:
            raise _bad("a verifier key does not end in base64; expected <name>+<8 hex digits>+<base64>") from e
        if typed[:1] != _ED25519:
            raise _bad("a verifier key is not of Ed25519")
        key = cls(name, typed[1:])
        if key.text != text or digits != key.key_hash.hex():
            raise _bad("the hash in a verifier key does not fit its name and its public key")
        return key

    @property
    def key_hash(self) -> bytes:
        """4 bytes that tell keys apart; not a proof of anything."""
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.public_key).digest()[:_KEY_HASH_BYTES]

    @property
    def text(self) -> str:
        """The key as one line, undone by ``parse``."""
        return f"{self.name}+{self.key_hash.hex()}+{to_base64(_ED25519 + self.public_key)}"

    def is_signed(self, message: bytes, signature: bytes) -> bool:
        """Whether this key signed exactly these bytes."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, message)
        except InvalidSignature:
            return False
        return True


def origin_of(public_key: bytes) -> str:
    """The name of the log that signs with this key."""
    return ORIGIN_PREFIX + hashlib.sha256(LOG_ID_DOMAIN + public_key).hexdigest()[:32]


def sign_note(body: str, key: VerifierKey, sign: Sign) -> str:
    """The body with one signature line.

    Args:
        body: ends in a newline; no control characters besides newlines.
        sign: the private half of ``key``, e.g. ``Ed25519PrivateKey.sign``.
    """
    _check_text(body)
    return f"{body}\n— {key.name} {to_base64(key.key_hash + sign(body.encode()))}\n"


def open_note(text: str, key: VerifierKey) -> str:
    """The body of a note that ``key`` signed. Signatures of other keys are passed over, as C2SP wants it.

    Raises:
        LogVerificationError: kind ``"bad_signature"``: not a note, not signed by this key, or altered.
    """
    body, signatures = read_note(text)
    ours = [s for name, hashed, s in signatures if name == key.name and hashed == key.key_hash]
    if not ours:
        raise _bad(f"a signed note has no signature of {key.name} ({key.key_hash.hex()})")
    if not all(key.is_signed(body.encode(), s) for s in ours):
        raise _bad(f"the signature of {key.name} is not over this text: the note was altered")
    return body


def read_note(text: str) -> tuple[str, list[tuple[str, bytes, bytes]]]:
    """The body of a note and the name, key hash and signature of each of its lines. Nothing is verified.

    Raises:
        LogVerificationError: kind ``"bad_signature"``: not a note.
    """
    _check_text(text)
    body, separator, lines = text.rpartition("\n\n")
    if not separator or not lines:
        raise _bad("this is not a signed note: there is no empty line before its signatures")
    signatures = [_signature(line) for line in lines.removesuffix("\n").split("\n")]
    if len(signatures) > _MAX_SIGNATURES:
        raise _bad(f"a signed note has more than {_MAX_SIGNATURES} signatures")
    return body + "\n", signatures


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log holds at one moment: the root over its first ``size`` leaves (32 bytes)."""

    origin: str
    size: int
    root: bytes

    def body(self) -> str:
        """The text that is signed: three lines."""
        return f"{self.origin}\n{self.size}\n{to_base64(self.root)}\n"

    @classmethod
    def parse(cls, body: str) -> Self:
        """Read the body. Lines after the third are extensions, passed over as C2SP wants it.

        Raises:
            LogVerificationError: kind ``"bad_signature"``: not a checkpoint.
        """
        lines = body.split("\n")
        if len(lines) < 4 or lines[-1] or not all(lines[:-1]):
            raise _bad("a checkpoint is not three lines: origin, size, root")
        origin, digits, encoded = lines[:3]
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and str(int(digits)) == digits):
            raise _bad("the size in a checkpoint is not a decimal number without leading zeros")
        try:
            root = from_base64(encoded)
        except ValueError as e:
            raise _bad("the root in a checkpoint is not base64") from e
        if len(root) != HASH_BYTES or int(digits) > MAX_SIZE:
            raise _bad(f"the root in a checkpoint is not of {HASH_BYTES} bytes, or its size is impossible")
        return cls(origin, int(digits), root)

    @classmethod
    def open(cls, note_text: str, key: VerifierKey) -> Self:
        """The checkpoint in a note that ``key`` signed, of the log that the key is named after.

        Raises:
            LogVerificationError: kind ``"bad_signature"``.
        """
        checkpoint = cls.parse(open_note(note_text, key))
        if checkpoint.origin != key.name:
            raise _bad(f"{key.name} signed a checkpoint of another log, {checkpoint.origin}")
        return checkpoint


def _signature(line: str) -> tuple[str, bytes, bytes]:
    """Name, key hash and signature of a line."""
    dash, _, rest = line.partition(" ")
    name, _, encoded = rest.partition(" ")
    try:
        data = from_base64(encoded)
    except ValueError as e:
        raise _bad("a signature line is not: — name base64") from e
    if dash != "—" or not name or "+" in name or len(data) <= _KEY_HASH_BYTES:
        raise _bad("a signature line is not: — name base64")
    return name, data[:_KEY_HASH_BYTES], data[_KEY_HASH_BYTES:]


def _check_text(text: str) -> None:
    if len(text) > _MAX_NOTE:
        raise _bad(f"a signed note is longer than {_MAX_NOTE} characters")
    if not text.endswith("\n") or any(c < " " and c != "\n" for c in text):
        raise _bad("a signed note does not end in a newline, or it has control characters")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise _bad("a signed note has characters that UTF-8 cannot hold") from e


def _bad(message: str) -> LogVerificationError:
    return LogVerificationError(message, kind="bad_signature")
