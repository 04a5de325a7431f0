"""The result of an empirical audit as a dataset's ledger keeps it: its figures, and a digest of the whole document.

The document (schema tg-tinker/empirical-audit/v1, docs/how-empirical-audit-works.md) stays with whoever ran it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import rfc8785

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.releases import count_of, decimal_of, text_of

SCHEMA: Final = "tg-tinker/empirical-audit/v1"
MODES: Final = ("input", "gradient")
MAX_BYTES: Final = 1 << 20
MAX_TEXT: Final = 200
MAX_ALARMS: Final = 50
FIELDS: Final = frozenset(
    {
        "schema", "created", "version", "model", "mode", "canaries", "claimed_epsilon", "claimed_delta",
        "audited_dataset", "lower_bound", "confidence", "most_provable", "false_alarm_rate", "checks", "alarms",
        "digest",
    }
)  # fmt: skip


def summary_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a ledger keeps of an audit's result.

    Raises:
        InvalidRequestError: it is not one, or it says of itself what its findings do not.
    """
    try:
        claimed, bound, findings = document["claimed"], document["lower_bound"], document["findings"]
        alarms = [text_of(f["name"], "name") for f in findings if _flag(f["alarm"])]
        if _flag(document["alarm"]) != bool(alarms):
            raise ValueError("its verdict is not that of its findings")
        summary = {
            "schema": document["schema"],
            "created": document["created"],
            "version": document["version"],
            "model": document["model"],
            "mode": document["mode"],
            "canaries": document["canaries"],
            "claimed_epsilon": claimed["epsilon"],
            "claimed_delta": claimed["delta"],
            "audited_dataset": claimed["dataset_id"],
            "lower_bound": bound["epsilon"],
            "confidence": bound["confidence"],
            "most_provable": bound["most_provable"],
            "false_alarm_rate": document["false_alarm_rate"],
            "checks": len(findings),
            "alarms": alarms[:MAX_ALARMS],
            "digest": "sha256:" + hashlib.sha256(rfc8785.dumps(dict(document))).hexdigest(),
        }
        check_summary(summary)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InvalidRequestError(
            f"this is not the result of an empirical audit: {e}; take the file of `tg-tinker audit run --out`",
            field="result",
            constraint=SCHEMA,
        ) from e
    return summary


def check_summary(summary: Mapping[str, Any]) -> None:
    """Whether a ledger's entry may hold this.

    Raises:
        ValueError, TypeError: a field is unknown, missing, or not what it should be.
    """
    if set(summary) != FIELDS:
        raise ValueError(f"it has the fields {sorted(summary)}")
    for name in ("created", "version", "model", "audited_dataset", "digest"):
        _line(summary[name], name)
    if summary["schema"] != SCHEMA or summary["mode"] not in MODES:
        raise ValueError(f"it is of schema {summary['schema']!r} and mode {summary['mode']!r}")
    for name in ("claimed_epsilon", "lower_bound", "most_provable"):
        decimal_of(summary[name], name, infinite=True)
    for name in ("claimed_delta", "confidence", "false_alarm_rate"):
        if not 0 < decimal_of(summary[name], name) < 1:
            raise ValueError(f"{name} is no probability")
    for name in ("canaries", "checks"):
        count_of(summary[name], name)
    alarms = summary["alarms"]
    if not isinstance(alarms, list) or len(alarms) > MAX_ALARMS:
        raise ValueError("its alarms are no list")
    for alarm in alarms:
        _line(alarm, "alarm")


def _line(value: object, name: str) -> None:
    text = text_of(value, name)
    if len(text) > MAX_TEXT or not text.isprintable():
        raise ValueError(f"{name} is not one line of at most {MAX_TEXT} characters")


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"an alarm is {value!r}")
    return value
