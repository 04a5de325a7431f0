"""The result of an empirical audit as a dataset's ledger keeps it: its figures, and a digest of the whole document.

The document (schema tg-tinker/empirical-audit/v1, docs/how-empirical-audit-works.md) stays with whoever ran it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

import rfc8785

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.releases import count_of, decimal_of, text_of

SCHEMA: Final = "tg-tinker/empirical-audit/v1"
MODES: Final = ("input", "gradient")
MAX_BYTES: Final = 1 << 20
MAX_ALARMS: Final = 50
MAX_AUDITS: Final = 20  # of one dataset
ABOVE: Final = "lower bound above the claim"
FIELDS: Final = frozenset(
    {
        "schema", "created", "version", "model", "mode", "canaries", "claimed_epsilon", "claimed_delta",
        "audited_dataset", "lower_bound", "confidence", "most_provable", "false_alarm_rate", "checks", "alarms",
        "digest",
    }
)  # fmt: skip
# Whoever attaches a result writes into a log that nothing is ever removed from, so no field holds free text.
_WORDS: Final = re.compile(r"[A-Za-z0-9 ._:/+,()=%@-]{1,100}")
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{6})?\+00:00")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_FORMS: Final = {
    _WORDS: "1 to 100 letters, digits and ._:/+,()=%@-",
    _TIME: "a time like 2026-01-02T03:04:05+00:00",
    _DIGEST: "a digest like sha256:00ff",
}
_NAME: Final = 60  # characters of an alarm
_SURE: Final = 0.5  # what is less sure than a coin is no bound; `audit run` takes no less either


def summary_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a ledger keeps of an audit's result. A lower bound above the claim is an alarm, whatever the findings say.

    Raises:
        InvalidRequestError: it is not one, or it says of itself what its findings do not.
    """
    try:
        claimed, bound, findings = document["claimed"], document["lower_bound"], document["findings"]
        alarms = [text_of(f["name"], "name") for f in findings if _flag(f["alarm"])]
        if _flag(document["alarm"]) != bool(alarms):
            raise ValueError("its verdict is not that of its findings")
        alarms = [name[:_NAME] for name in alarms[:MAX_ALARMS]]
        if not alarms and _above(bound["epsilon"], claimed["epsilon"]):
            alarms = [ABOVE]
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
            "alarms": alarms,
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
    for name, form in (("created", _TIME), ("version", _WORDS), ("model", _WORDS), ("audited_dataset", _WORDS)):
        _in_form(summary[name], name, form)
    _in_form(summary["digest"], "digest", _DIGEST)
    if summary["schema"] != SCHEMA or summary["mode"] not in MODES:
        raise ValueError(f"it is of schema {summary['schema']!r} and mode {summary['mode']!r}")
    for name in ("claimed_delta", "confidence", "false_alarm_rate"):
        if not 0 < decimal_of(summary[name], name) < 1:
            raise ValueError(f"{name} is no probability")
    if decimal_of(summary["confidence"], "confidence") <= _SURE:
        raise ValueError(f"its bound has confidence {summary['confidence']}, no better than a coin")
    bound, most = (decimal_of(summary[name], name) for name in ("lower_bound", "most_provable"))
    if bound > most:
        raise ValueError(f"it shows an epsilon of {bound}, and says that no more than {most} could be shown")
    for name in ("canaries", "checks"):
        if not count_of(summary[name], name):
            raise ValueError(f"its {name} are none")
    _check_alarms(summary, _above(summary["lower_bound"], summary["claimed_epsilon"]))


def _check_alarms(summary: Mapping[str, Any], above: bool) -> None:
    alarms = summary["alarms"]
    if not isinstance(alarms, list) or len(alarms) > min(MAX_ALARMS, summary["checks"]):
        raise ValueError("its alarms are no list, or more than its checks")
    for alarm in alarms:
        _in_form(alarm, "alarm", _WORDS)
        if len(alarm) > _NAME:
            raise ValueError(f"an alarm is longer than {_NAME} characters")
    if above and not alarms:
        raise ValueError("its lower bound is above the claim, and it raises no alarm")


def _above(bound: object, claimed: object) -> bool:
    return decimal_of(bound, "lower_bound") > decimal_of(claimed, "claimed_epsilon", infinite=True)


def _in_form(value: object, name: str, form: re.Pattern[str]) -> None:
    if not form.fullmatch(text_of(value, name)):
        raise ValueError(f"its {name} is not {_FORMS[form]}")


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"an alarm is {value!r}")
    return value
