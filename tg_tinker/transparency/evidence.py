"""Goes through every receipt that was kept: is each true, and do they agree with each other and with the pins?

Two true receipts that contradict each other prove that the log was rewritten: both carry its signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tg_tinker.errors import TGTinkerError
from tg_tinker.transparency.note import ORIGIN_PREFIX
from tg_tinker.transparency.pins import Pin, Pins
from tg_tinker.transparency.receipts import Receipt, ReceiptFile, Receipts


@dataclass(frozen=True, slots=True)
class Finding:
    """What one line of a file of receipts came to; ``fault`` is empty where it is true and contradicts nothing."""

    file: ReceiptFile
    line: int
    origin: str
    dataset_id: str
    fault: str


@dataclass(slots=True)
class _Log:
    """What one log signed for so far, by whichever dataset."""

    pin: Pin | None
    roots: dict[int, bytes] = field(default_factory=dict)
    entries: dict[int, str] = field(default_factory=dict)


def check_receipts(receipts: Receipts, pins: Pins) -> Iterator[Finding]:
    """Every line of every file, in order.

    Raises:
        InvalidRequestError: a pin is damaged.
    """
    logs: dict[str, _Log] = {}
    for file in receipts.files():
        origin = ORIGIN_PREFIX + file.origin_digits
        for number, receipt in file.lines():
            if not isinstance(receipt, Receipt):
                yield Finding(file, number, origin, "", receipt.message)
                continue
            log = logs.get(origin)
            if log is None:
                log = logs[origin] = _Log(pins.get(origin))
            dataset_id = ""
            try:
                fault = _fault(receipt, origin, log)
                dataset_id = receipt.dataset_id
            except TGTinkerError as e:
                fault = e.message
            yield Finding(file, number, origin, dataset_id, fault)


def _fault(receipt: Receipt, origin: str, log: _Log) -> str:
    checkpoint = receipt.verify()
    if checkpoint.origin != origin:
        return f"it is of another log, {checkpoint.origin}"
    pinned = None if log.pin is None else log.pin.checkpoint
    if pinned is not None and checkpoint.size > pinned.size:
        return (
            f"the log signed for {checkpoint.size} entries, and the pin has {pinned.size}: "
            "the log was rolled back, or the pin put back"
        )
    roots = {checkpoint.root, log.roots.setdefault(checkpoint.size, checkpoint.root)}
    if pinned is not None and pinned.size == checkpoint.size:
        roots.add(pinned.root)
    if len(roots) > 1:
        return f"the log signed for two histories of {checkpoint.size} entries: it was forked"
    if log.entries.setdefault(receipt.leaf_index, receipt.entry) != receipt.entry:
        return f"the log signed for two entries at place {receipt.leaf_index}: it was forked"
    return ""
