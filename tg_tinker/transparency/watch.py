"""Watches one tenant's log on one server: what it shows now must continue what it showed before."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

from tg_tinker.errors import LogVerificationError
from tg_tinker.transparency.merkle import EMPTY_ROOT, verify_consistency
from tg_tinker.transparency.note import Checkpoint, VerifierKey, origin_of
from tg_tinker.transparency.pins import KnownServer, Pin, Pins, day
from tg_tinker.transparency.receipts import Receipt, Receipts

_log = logging.getLogger("tg_tinker")
_REMEMBERED = 10_000  # verified checkpoints kept in memory, about 2 MB


class Watch:
    """What this process knows of the log of one tenant at one address. Threads may share it.

    Ask the server for its checkpoint and for the proof from ``known_size``, and hand both to ``advance``. The first
    error is final: every later call raises it again, so that nothing is trained on a server whose history is not
    what it was.

    Several requests may be under way at once. Each answer is held to the checkpoint that its request named, and to
    every checkpoint of the same size; answers that overtook one another are held to their common past.
    """

    def __init__(
        self,
        pins: Pins,
        *,
        address: str,
        tenant: str,
        loopback: bool,
        receipts: Receipts | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        save_s: float = 1.0,
    ) -> None:
        """Begin where the pins left off.

        Args:
            address: ``host:port``.
            loopback: the address is this machine; then another log may answer at it, since embedded servers come
                and go. A log once seen is held to its pin there too.
            receipts: where verified receipts are kept.
            save_s: a pin is written at most so often, since flushing it to disk takes as long as a small step.

        Raises:
            InvalidRequestError: a pin is damaged.
        """
        self._pins, self._receipts, self._now = pins, receipts, now
        self._address, self._tenant, self._loopback = address, tenant, loopback
        self._lock = threading.RLock()
        self._unsaved: Pin | None = None
        self._verified = False  # something, in this process
        self._foreign: set[int] = set()
        self._save_s, self._saved_s = save_s, -math.inf
        self._broken: LogVerificationError | None = None
        self._origin = pins.origin_at(address, tenant)
        self._seen: dict[int, tuple[bytes, datetime]] = {}  # size -> root and when
        self._newest: Checkpoint | None = None
        self._key: VerifierKey | None = None
        self._begin()

    @property
    def known_size(self) -> int:
        """Size of the newest checkpoint verified; 0 for none. What to ask the server for a proof from."""
        with self._lock:
            self._raise_again()
            return 0 if self._newest is None else self._newest.size

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint verified."""
        with self._lock:
            self._raise_again()
            return self._newest

    @property
    def verifier_key(self) -> VerifierKey | None:
        """The log's key, once it is known."""
        with self._lock:
            return self._key

    def advance(self, checkpoint_note: str, verifier_key: str, from_size: int, proof: Sequence[bytes]) -> bool:
        """Verify what the server shows now.

        Args:
            from_size: the size that was sent with the request.
            proof: of consistency between it and the checkpoint.

        Returns:
            Whether it is verified. ``False``: it may be true, but the request named a size that means nothing for
            this log, because only the answer told which log it is: ask again with ``known_size``, which has changed.

        Raises:
            LogVerificationError: rolled back, forked, another log, or not signed by it.
        """
        with self._lock:
            self._raise_again()
            try:
                return self._advance(checkpoint_note, verifier_key, from_size, proof)
            except LogVerificationError as e:
                self._break(e)

    @property
    def unsaved(self) -> bool:
        """Whether a pin waits for its turn to be written."""
        with self._lock:
            return self._unsaved is not None

    def foreign_sizes(self) -> set[int]:
        """Sizes that other processes of this user saw and this one did not, each given once: show that the newest
        tree continues them.
        """
        with self._lock:
            found, self._foreign = self._foreign, set()
            return found

    def save(self) -> None:
        """Write the newest pin now, which otherwise waits for its turn: a process that is killed may forget it.

        Raises:
            LogVerificationError: another process saw another history.
        """
        with self._lock:
            try:
                self._save()
            except LogVerificationError as e:
                self._break(e)

    def check_receipt(self, receipt: Receipt) -> None:
        """Verify a receipt whose checkpoint was verified by ``advance``, and keep it.

        Raises:
            LogVerificationError: the entry is not where the server says, or the checkpoint is another.
        """
        with self._lock:
            self._raise_again()
            try:
                checkpoint = receipt.verify(self._key)
                seen = self._seen.get(checkpoint.size)
                if seen is None:
                    raise LogVerificationError(
                        f"the receipt is for size {checkpoint.size} of the log, which was never shown to continue "
                        "what was seen before",
                        kind="bad_proof",
                    )
                self._same_root(checkpoint, seen)
            except LogVerificationError as e:
                self._break(e)
        if self._receipts is not None:
            self._receipts.append(receipt)

    def _advance(self, note: str, verifier_key: str, from_size: int, proof: Sequence[bytes]) -> bool:
        key = VerifierKey.parse(verifier_key)
        if origin_of(key.public_key) != key.name:
            raise self._error("bad_signature", f"{key.name} is not the name that follows from its key")
        checkpoint = Checkpoint.open(note, key)
        self._identify(key)
        if from_size not in self._seen:
            return False
        root, when = self._seen[from_size]
        details = {"shown_size": checkpoint.size, "seen_size": from_size, "seen": day(when), "checkpoint": note}
        if checkpoint.size < from_size:
            raise self._error(
                "rolled_back",
                f"its log was rolled back: it shows {checkpoint.size} entries, we saw {from_size} on {day(when)}. "
                "An older state of the server was put back, or entries were deleted",
                details,
            )
        if checkpoint.size in self._seen:
            self._same_root(checkpoint, self._seen[checkpoint.size], note)
        try:
            verify_consistency(from_size, checkpoint.size, root, checkpoint.root, proof)
        except LogVerificationError as e:
            raise self._error(
                "forked",
                f"its log was forked: the {checkpoint.size} entries it shows do not continue the {from_size} that we "
                f"saw on {day(when)}. Entries were changed, replaced or removed",
                details,
            ) from e
        self._remember(checkpoint, note, key)
        return True

    def _identify(self, key: VerifierKey) -> None:
        """Hold the server to the log that answered here before, or start with the one that answers now."""
        if key.name != self._origin:
            if self._origin is not None and (self._verified or not self._loopback):
                raise self._error(
                    "identity_changed",
                    f"another log answers: {key.name}, where {self._origin} did before. The server was installed "
                    "anew, the tenant's keys were destroyed, or somebody is in between. If this is meant: "
                    f"tg-tinker log forget {self._address}",
                    {"origin": key.name, "known_origin": self._origin},
                )
            if self._origin is not None:
                _log.warning(
                    "another log answers at %s than before (%s, then %s): on this machine that is taken for another "
                    "server",
                    self._address,
                    self._origin,
                    key.name,
                )
            self._origin = key.name
            self._begin()
            self._pins.know(KnownServer(self._address, self._tenant, key.name))
        self._key = key

    def _begin(self) -> None:
        """Start from the pin of the log, or from nothing."""
        pin = None if self._origin is None else self._pins.get(self._origin)
        if pin is None:
            self._seen, self._newest, self._key = {0: (EMPTY_ROOT, self._now())}, None, None
        else:
            self._newest, self._key = pin.checkpoint, pin.key
            self._seen = {pin.checkpoint.size: (pin.checkpoint.root, pin.seen)}
            self._add_newest_receipt(pin)

    def _add_newest_receipt(self, pin: Pin) -> None:
        """A process that was killed may have left receipts that are newer than its pin."""
        receipt = None if self._receipts is None else self._receipts.newest(pin.key.name)
        if receipt is None:
            return
        try:
            checkpoint = receipt.verify(pin.key)
        except LogVerificationError:
            return  # `tg-tinker log verify-receipts` says so; a damaged line is no reason to refuse a server
        if checkpoint.size > pin.checkpoint.size:
            self._newest = checkpoint
            self._seen[checkpoint.size] = (checkpoint.root, pin.seen)
            self._foreign.add(pin.checkpoint.size)

    def _remember(self, checkpoint: Checkpoint, note: str, key: VerifierKey) -> None:
        moment = self._now()
        self._verified = True
        if self._newest is None:
            # Everything continues the empty log: from here on, an answer to a request that named it proves nothing.
            self._seen.clear()
        self._seen.setdefault(checkpoint.size, (checkpoint.root, moment))
        if len(self._seen) > _REMEMBERED:
            del self._seen[min(self._seen)]
        if self._newest is None or checkpoint.size > self._newest.size:
            self._newest = checkpoint
            self._unsaved = Pin(key, note, moment)
            if time.monotonic() - self._saved_s >= self._save_s:
                self._save()

    def _save(self) -> None:
        if self._unsaved is None:
            return
        other = self._pins.get(self._unsaved.key.name)
        if other is not None and other.checkpoint.size not in self._seen:
            self._seen[other.checkpoint.size] = (other.checkpoint.root, other.seen)
            self._foreign.add(other.checkpoint.size)
        self._pins.put(self._unsaved)
        self._unsaved = None
        self._saved_s = time.monotonic()

    def _same_root(self, checkpoint: Checkpoint, seen: tuple[bytes, datetime], note: str = "") -> None:
        root, when = seen
        if checkpoint.root != root:
            raise self._error(
                "forked",
                f"its log was forked: at {checkpoint.size} entries it shows another root than on {day(when)}. "
                "Entries were changed or replaced",
                {"shown_size": checkpoint.size, "seen_size": checkpoint.size, "seen": day(when), "checkpoint": note},
            )

    def _error(self, kind: str, what: str, details: dict[str, Any] | None = None) -> LogVerificationError:
        whose = f" for tenant {self._tenant}" if self._tenant else ""
        return LogVerificationError(
            f"the server at {self._address} cannot be trusted{whose}: {what}",
            kind=kind,
            details={"address": self._address, "tenant": self._tenant, **(details or {})},
        )

    def _break(self, error: LogVerificationError) -> NoReturn:
        told = "address" in error.details
        self._broken = error if told else self._error(error.kind, error.message, error.details)
        raise self._broken from (None if told else error)

    def _raise_again(self) -> None:
        if self._broken is not None:
            raise LogVerificationError(self._broken.message, kind=self._broken.kind, details=self._broken.details)
