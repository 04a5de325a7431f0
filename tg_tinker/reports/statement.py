"""The privacy report as a document, format tg-tinker/privacy-report/v2: values in, one JSON object out.

Every sentence in it follows from the entries of the ledger and is part of the format. The server writes the
document with this function; whoever verifies one builds it again from the entries and compares, so that a report
cannot say in words what its numbers do not. Prepared along NIST SP 800-226.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from typing import Any, Final

from tg_tinker.ledger.history import NEIGHBOURS, History, Terms
from tg_tinker.ledger.releases import Release

FORMAT: Final = "tg-tinker/privacy-report/v2"
PAYLOAD_TYPE: Final = "application/vnd.tg-tinker.privacy-report.v2+json"
CURVE_POINTS: Final = 500
PROFILE_DELTAS: Final = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)

PREPARED: Final = (
    "Prepared along NIST SP 800-226, Guidelines for Evaluating Differential Privacy Guarantees. NIST has neither "
    "reviewed nor endorsed it."
)
GATES: Final = {
    "rdp": "Renyi DP with integer costs rounded up, composed adaptively",
    "prv": "privacy loss distribution of one schedule that was fixed before anything was released",
}
KEPT: Final = (
    "However the steps were chosen along the way, the gate keeps the dataset within its target epsilon. An epsilon "
    "below the target is that of the releases as recorded, as if they had been fixed beforehand."
)
NOT_KEPT: Final = (
    "No target was set: epsilon is that of the releases as recorded, as if they had been fixed beforehand."
)
ALL_RUNS: Final = (
    "Every run ever opened on this dataset, with every release that was paid for. Failed, repeated and unsettled "
    "releases and runs made to tune something count in full."
)
COVERED: Final = (
    "The released weights, checkpoints and adapters, and everything that anybody computes from them later.",
    "Text sampled from the released weights, however much of it.",
    "All runs together: somebody who holds the results of every run learns no more than this report says.",
)
NOT_COVERED: Final = (
    "Losses, gradient norms and other diagnostics returned to the data's owner are exact and not covered.",
    "Choices made by looking at private data outside this server (cleaning, tuning, stopping) are not covered.",
    "Groups of related units are covered only at a multiple of epsilon.",
    "The base model's own training data is not covered.",
    "Copies of the same data that were used under another dataset id are not covered.",
)
TRUST: Final = (
    "The owner of the data and this server are trusted; whoever receives the model is not.",
    "The server's signature says that its log holds these entries. It does not show that the server drew the noise "
    "it recorded; an empirical audit can speak against that, and cannot prove it.",
)
RUN: Final = (
    "An attack on a training of its own, with canaries in place of data, by the software that whoever attached the "
    "result names. Its lower bound on epsilon speaks against the claim that was made for that training, which stands "
    "beside it with what could have been shown at most. It says nothing of this dataset's epsilon, large or small: "
    "none of this dataset's runs was attacked."
)
NOT_RUN: Final = "No empirical audit is recorded for this dataset."


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What accountants say of the releases; everything else in a report follows from the entries.

    Attributes:
        rdp: epsilon by the Renyi gate, all of delta to itself.
        pld: epsilon by privacy loss distributions (dp_accounting, pessimistic); inf: not computed, or no bound. It
            is not computed for more than a few kinds of releases, each of which takes it a tenth of a second.
        gdp: the central-limit estimate, or ``None`` where it does not apply.
        profile: (delta, rdp, pld) for each of :func:`profile_deltas`.
    """

    rdp: float
    pld: float
    gdp: float | None
    profile: tuple[tuple[float, float, float], ...]


def profile_deltas(target_delta: float) -> list[float]:
    """The deltas at which a report states epsilon, falling; the dataset's own is among them."""
    return sorted({*PROFILE_DELTAS, target_delta}, reverse=True)


def statement(
    history: History, figures: Figures, *, time: str, server_version: str, integrity: dict[str, Any]
) -> dict[str, Any]:
    """The document: JSON values, with real numbers as decimal strings.

    Args:
        time: when the report's own entry was appended.
        integrity: entries, proof, checkpoint and key, as docs/formats/report.md has them.
    """
    terms, releases = history.in_force, history.releases
    spent = history.epsilon_spent
    return {
        "format": FORMAT,
        "prepared": PREPARED,
        "dataset_id": history.dataset_id,
        "time": time,
        "server_version": server_version,
        "guarantee": {
            "sentence": sentence(spent, terms, releases),
            "epsilon": number(spent),
            "delta": number(terms.target_delta),
            "target_epsilon": number(terms.target_epsilon),
            "privacy_unit": terms.unit,
            "neighbours": NEIGHBOURS,
        },
        "privacy_profile": [
            {"delta": number(delta), "rdp": number(rdp), "pld": number(pld)} for delta, rdp, pld in figures.profile
        ],
        "curve": _curve(history),
        "coverage": _coverage(history),
        "mechanism": {
            "name": "DP-SGD: per-unit clipping, Gaussian noise on the sum, a public divisor",
            "releases": _counted(history),
            "noise_source": "keystream cipher keyed by the operating system; no user seed, never saved",
        },
        "sampling": _sampling(releases),
        "assumptions": _assumptions(releases),
        "accounting": _accounting(history, figures),
        "trust_model": list(TRUST),
        "empirical_audit": _audited(history),
        "integrity": integrity,
    }


def _audited(history: History) -> dict[str, Any]:
    if not history.audits:
        return {"status": "not run", "note": NOT_RUN}
    alarms = sum(bool(a["result"]["alarms"]) for a in history.audits)
    return {
        "status": "alarm" if alarms else "no alarm",
        "note": RUN,
        "results": [{"attached_by": a["actor"], "time": a["time"], **a["result"]} for a in history.audits],
    }


def number(value: float) -> str:
    """A real number as it stands in a report: the shortest decimal string that reads back the same, or "inf"."""
    return repr(float(value))


def rounded_up(epsilon: float, digits: int = 3) -> str:
    """Epsilon for people: never smaller than it is.

    >>> rounded_up(1.00001), rounded_up(2.5), rounded_up(math.inf)
    ('1.001', '2.500', 'inf')
    """
    if not math.isfinite(epsilon):
        return "inf"
    with localcontext(prec=400):
        return str(Decimal(number(epsilon)).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING))


def small(probability: float) -> str:
    """A small probability as people write it: at most six digits, and never smaller than it is.

    >>> small(2e-05), small(0.01), small(1.00000049e-5)
    ('2e-5', '0.01', '1.00001e-5')
    """
    up = Context(prec=6, rounding=ROUND_CEILING).create_decimal(number(probability))
    return f"{float(up):g}".replace("e-0", "e-")


def sentence(epsilon: float, terms: Terms, releases: Sequence[Release]) -> str:
    """The guarantee in one plain sentence."""
    what = "record" if terms.unit == "datum" else terms.unit
    if any(r.kind == "unnoised" for r in releases):
        return "An un-noised gradient was released: there is no finite guarantee."
    if not math.isfinite(epsilon):
        return "Too little noise was added for any finite guarantee."
    return (
        f"Adding or removing one {what} changes the probability of any outcome of the training by at most a "
        f"factor of exp({rounded_up(epsilon)}), except with probability {small(terms.target_delta)}."
    )


def thinned(count: int, most: int = CURVE_POINTS) -> list[int]:
    """Indices of at most ``most`` of ``count`` things, evenly spread, with the first and the last.

    >>> thinned(3), thinned(10, 4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]


def _curve(history: History) -> dict[str, Any]:
    chosen = [(i, history.charges[i]) for i in thinned(len(history.charges))]
    return {
        "charges": len(history.charges),
        "points": [
            {"charge": i + 1, "position": c.position, "run_id": c.run_id, "time": c.time, "epsilon": c.epsilon_text}
            for i, c in chosen
        ],
    }


def _coverage(history: History) -> dict[str, Any]:
    runs = [
        {
            "run_id": r.run_id,
            "charged": r.charged,
            "released": r.released,
            "failed": r.failed,
            "unsettled": r.unsettled,
            "initial_weights": r.weights,
            **({} if r.custom_loss == "refuse" else {"custom_loss": r.custom_loss}),
        }
        for r in history.runs.values()
    ]
    public = [r.run_id for r in history.runs.values() if r.weights == "public"]
    attested = [f"Weights loaded into {', '.join(public)} are public by the client's word and not covered."]
    own = [r.run_id for r in history.runs.values() if r.custom_loss == "independent"]
    losses = [
        f"Losses that callers of {', '.join(own)} compute themselves are of one unit at a time by the client's word: "
        "in a loss over several, one unit shows in the gradients of the others."
    ]
    return {
        "what": ALL_RUNS,
        "runs": runs,
        "covered": list(COVERED),
        "not_covered": [*NOT_COVERED, *(attested if public else []), *(losses if own else [])],
        "changes": list(history.changes),
        "earlier_reports": len(history.reports) - 1,
    }


def _counted(history: History) -> list[dict[str, Any]]:
    counts: dict[str, int] = {}
    for charge in history.charges:
        text = json.dumps(charge.event, sort_keys=True)
        counts[text] = counts.get(text, 0) + 1
    return [{"event": json.loads(text), "times": times} for text, times in counts.items()]


def _sampling(releases: Sequence[Release]) -> dict[str, Any]:
    by = {who: sum(r.amplified and r.vouched_by == who for r in releases) for who in ("server", "client")}
    words = {"server": "drawn by the server", "client": "attested by the client"}
    claims = [f"{count} {words[who]}" for who, count in by.items() if count]
    claim = "No amplification by sampling is claimed."
    if claims:
        claim = (
            f"Amplification by Poisson sampling is claimed for {sum(by.values())} of {len(releases)} releases: "
            f"{', '.join(claims)}."
        )
    return {"claim": claim, "amplified": sum(by.values()), "by_server": by["server"], "by_client": by["client"]}


def _assumptions(releases: Sequence[Release]) -> list[str]:
    """What has to be true of the batches, besides the arithmetic."""
    found = []
    if any(not r.amplified for r in releases):
        found.append(
            "Where batches were chosen: which units share a step does not depend on whether one of them is there; "
            "leaving a unit out leaves its place empty."
        )
    if any(r.kind == "participation_gaussian" for r in releases):
        found.append(
            "Where participation was counted: one unit goes by one name, or by one content, throughout a run."
        )
    if any(r.amplified for r in releases):
        found.append("Where batches were sampled: each unit was drawn on its own, with the stated probability.")
    return found


def _accounting(history: History, figures: Figures) -> dict[str, Any]:
    accountant = history.accountant
    estimate = None
    if figures.gdp is not None:
        note = "a central-limit estimate, NOT an upper bound"
        estimate = {"accountant": "gdp", "epsilon": number(figures.gdp), "note": note}
    computed = math.isfinite(figures.pld) or not math.isfinite(history.epsilon_spent)
    return {
        "accountant": accountant,
        "gate": GATES[accountant],
        "adaptivity": KEPT if math.isfinite(history.in_force.target_epsilon) else NOT_KEPT,
        "rdp": number(figures.rdp),
        "cross_check": {
            "accountant": "pld (dp_accounting)",
            "epsilon": number(figures.pld) if computed else "not computed",
        },
        "estimate": estimate,
    }
