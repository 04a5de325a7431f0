"""Holds one server to its transparency log: at connection, after every restart, with every paid step.

What is verified here is what `tg_tinker.transparency` knows; this file asks the server for it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tg_tinker._transport import Transport, encode
from tg_tinker.errors import LogVerificationError, TGTinkerError
from tg_tinker.ledger.history import NEIGHBOURS
from tg_tinker.ledger.releases import Release
from tg_tinker.transparency.receipts import Receipt
from tg_tinker.transparency.watch import Watch
from tg_tinker.types import DPMetrics, OptimStepOutput
from tg_tinker.types.log import LogReceipt
from tg_tinker.types.run import PrivacyState, RunInfo
from tg_tinker.wire.log import checkpoint_from_proto, checkpoint_request

_SAVE_S = 1.0  # how long a pin may wait
_UNTIED = 3  # questions in a row that a server may leave unanswered
_MOST_SIZES = 50  # in one question
_ATTEMPTS = 3  # the first answer may tell which log it is, and with it what we know of it


@dataclass(frozen=True, slots=True)
class RunTerms:
    """What every charge of a run must say, as it was agreed when the run was made or taken up.

    Attributes:
        privacy: ``None`` for a run without differential privacy, which has no charges.
        unit: what one epsilon protects.
    """

    run_id: str
    privacy: PrivacyState | None
    unit: str = "datum"

    @classmethod
    def of(cls, info: RunInfo) -> RunTerms:
        """Of a run as the server describes it.

        Raises:
            LogVerificationError: it is private by its configuration, and the server knows of no budget.
        """
        dp = info.config.dp_config
        if info.config.private and info.privacy is None:
            raise LogVerificationError(
                f"the server keeps no budget for {info.run_id}, whose configuration asks for privacy",
                kind="bad_proof",
            )
        return cls(info.run_id, info.privacy, dp.privacy_unit if dp is not None else "datum")

    def paid_by(self, receipt: LogReceipt, seq: int, dp: DPMetrics) -> bool:
        """Whether a receipt is of the charge of step ``seq`` that ``dp`` reports, unverified."""
        privacy = self.privacy
        assert privacy is not None
        try:
            body = json.loads(receipt.entry_json)
            release = Release.from_json(body["event"])
            told = (body["kind"], body["dataset_id"], body["run_id"], body["seq"], body["unit"], body["neighbours"])
            figures = float(body["epsilon_after"]), float(body["delta"])
        except (ValueError, KeyError, TypeError):
            return False
        if told != ("charge", privacy.dataset_id, self.run_id, seq, self.unit, NEIGHBOURS):
            return False
        if figures != (dp.total_epsilon, dp.delta):
            return False
        if not dp.noise_applied:
            return release.kind == "unnoised"
        return (release.noise_multiplier, release.sample_rate) == (privacy.noise_multiplier, privacy.sample_rate)


_open: weakref.WeakSet[LogGuard] = weakref.WeakSet()


@atexit.register
def _remember() -> None:
    for guard in list(_open):
        guard.close()


class LogGuard:
    """One tenant's log over one connection. Threads may share it.

    Every method raises the LogVerificationError that was raised first, for ever: nothing more is sent to a server
    whose history is not what it was.
    """

    def __init__(self, transport: Transport, watch: Watch) -> None:
        self._transport = transport
        self._watch = watch
        self._lock = threading.Lock()
        self._broken: TGTinkerError | None = None
        self._loose: set[int] = set()  # sizes of verified trees that the newest one was not proven to continue
        self._tying = False
        self._untied = 0
        self._saving = False
        _open.add(self)

    @property
    def known_size(self) -> int:
        """Size of the newest tree verified; what a request names to get a proof from there."""
        if self._broken is not None:
            raise self._broken
        return self._watch.known_size

    def check(self) -> None:
        """Ask for the log as it stands and verify it; returns when it holds. Blocks."""
        for _ in range(_ATTEMPTS):
            known = self.known_size
            if self._take(self._transport.call(checkpoint_request([known])), {known}):
                self._settle()
                return
        raise self._refused("the server's log changed its identity while it was asked for")

    def check_later(self) -> Future[None]:
        """As :meth:`check`, without blocking."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()

        def ask(attempts: int) -> None:
            try:
                known = self.known_size
            except LogVerificationError as e:
                done.set_exception(e)
                return
            call = self._transport.send(encode(checkpoint_request([known])))
            call.add_done_callback(lambda answered: judge(answered, known, attempts))

        def judge(answered: Future[Any], known: int, attempts: int) -> None:
            try:
                if self._take(answered.result(), {known}):
                    self._settle()
                    done.set_result(None)
                elif attempts > 1:
                    ask(attempts - 1)
                else:
                    raise self._refused("the server's log changed its identity while it was asked for")
            except TGTinkerError as e:
                done.set_exception(e)
            except Exception as e:  # noqa: BLE001 - whoever waits must learn that it will not come
                done.set_exception(self._unreadable(e))

        ask(_ATTEMPTS)
        return done

    def accept(self, terms: RunTerms, seq: int, known_size: int, result: OptimStepOutput) -> None:
        """Verify what proves that a step was paid for; a step without privacy has nothing to prove.

        Args:
            known_size: the size that the step's request named.

        Raises:
            LogVerificationError: the charge is not in the log, or is not what the run and the result say.
            InvalidRequestError: what is remembered of the log is damaged.
        """
        if terms.privacy is None:
            return
        try:
            self._accept(terms, seq, known_size, result)
        except TGTinkerError:
            raise
        except Exception as e:  # whatever a server may have put into a receipt
            raise self._unreadable(e) from e
        self._settle()

    def _accept(self, terms: RunTerms, seq: int, known_size: int, result: OptimStepOutput) -> None:
        receipt = result.receipt
        if receipt is None or result.dp_metrics is None:
            raise self._refused(f"step {seq} of {terms.run_id} came without the receipt of its charge")
        if receipt.log.known_size != known_size:
            raise self._refused("the server proved its log from another size than was asked for")
        newest = self.known_size
        if not terms.paid_by(receipt, seq, result.dp_metrics):
            raise self._refused(f"the receipt of step {seq} of {terms.run_id} is not of the charge it should be")
        if not self._watch.advance(
            receipt.log.checkpoint, receipt.log.verifier_key, known_size, receipt.log.consistency
        ):
            raise self._refused("the server's log changed its identity")
        kept = Receipt(
            entry=receipt.entry_json,
            leaf_index=receipt.leaf_index,
            checkpoint=receipt.log.checkpoint,
            proof=receipt.inclusion,
            verifier_key=receipt.log.verifier_key,
        )
        self._watch.check_receipt(kept)
        if known_size != newest:  # another step's answer came meanwhile: show that both are of one history
            self._tie(newest, kept.verify().size)

    def close(self) -> None:
        """Remember for the next process what this one saw last."""
        with contextlib.suppress(TGTinkerError):  # said before, or by whoever connects next
            self._watch.save()

    def _take(self, reply: Any, asked: set[int]) -> bool:
        states = checkpoint_from_proto(reply)
        if {s.known_size for s in states} != asked:
            raise self._refused("the server proved its log from another size than was asked for")
        held = [self._watch.advance(s.checkpoint, s.verifier_key, s.known_size, s.consistency) for s in states]
        return all(held)

    def _settle(self) -> None:
        """After a verification: hold the server to what other processes saw, and have the pin written soon."""
        foreign = self._watch.foreign_sizes()
        if foreign:
            self._tie(*foreign, self.known_size)
        with self._lock:
            if self._saving or not self._watch.unsaved:
                return
            self._saving = True
        self._transport.alarm.after(_SAVE_S, self._save)

    def _save(self) -> None:
        with self._lock:
            self._saving = False
        try:
            self._watch.save()
            self._settle()
        except LogVerificationError:
            pass  # the watch keeps it, and whatever is done next raises it
        except TGTinkerError as e:
            self._broken = self._broken or e

    def _tie(self, *sizes: int) -> None:
        """Have the server show that a later tree continues all of these; one question at a time."""
        with self._lock:
            self._loose.update(sizes)
            if self._tying:
                return
            self._tying = True
            asked = set(sorted(self._loose)[:_MOST_SIZES])
            self._loose -= asked
        call = self._transport.send(encode(checkpoint_request(asked)))
        call.add_done_callback(lambda answered: self._tied(answered, asked))

    def _tied(self, answered: Future[Any], asked: set[int]) -> None:
        with self._lock:
            self._tying = False
            waiting = bool(self._loose)
        try:
            self._take(answered.result(), asked)
        except LogVerificationError:
            return  # the watch keeps it, and whatever is done next raises it
        except Exception:  # noqa: BLE001 - a server that does not answer, or not in words of the protocol
            with self._lock:
                self._loose |= asked
                self._untied += 1
            if self._untied >= _UNTIED:
                self._refused("it does not show that the answers it gave are of one history")
            else:
                self._transport.alarm.after(_SAVE_S, self._tie)
            return
        self._untied = 0
        if waiting:
            self._tie()

    def _unreadable(self, reason: Exception) -> TGTinkerError:
        return self._refused(f"what it shows of its log cannot be read ({type(reason).__name__})")

    def _refused(self, why: str) -> TGTinkerError:
        """The error that ends all dealings with this server."""
        text = f"the server cannot be trusted: {why}. Nothing more is sent to it; ask its operator"
        self._broken = self._broken or LogVerificationError(text, kind="bad_proof")
        return self._broken
