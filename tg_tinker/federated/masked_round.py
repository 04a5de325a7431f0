"""One attempt at a round under masks, from the coordinator's side: five requests, and never a plain update.

Shape suffixes: P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.correspondence import Correspondence
from tg_tinker.federated.job import Job
from tg_tinker.federated.link import CoordinatorLink
from tg_tinker.federated.masking import ARRAY, MaskedMean, MaskingRound
from tg_tinker.federated.messages import Arrays
from tg_tinker.federated.rounds import Answer
from tg_tinker.federated.updates import weights_digest


@dataclass(slots=True, kw_only=True)
class MaskedAttempt:
    """What an attempt came to.

    Attributes:
        answers: word of every site that was asked; "update" for those in the sum.
        mean: ``None`` where too few sites were left.
        why: then.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    mean: MaskedMean | None = None
    why: str = ""


def masked_attempt(
    job: Job,
    letters: Correspondence,
    link: CoordinatorLink,
    *,
    sites: Iterable[str],
    place: tuple[int, int],
    weights: Arrays,
    size: int,
    opened: Collection[str] = (),
    before_open: Callable[[list[str]], None],
) -> MaskedAttempt:
    """Go through the steps of masking once.

    Args:
        sites: to begin with.
        place: round and attempt; never used before.
        weights: the whole model.
        size: P, of an update.
        opened: the set over which shares were asked for before, with the same weights; no other is summed then.
        before_open: called with the sites in the sum just before their shares are asked for, to be put on disk: from
            then on they take part in this round for the same sum only.
    """
    found = MaskedAttempt()
    steps = MaskingRound(job, *place, size=size, base=weights_digest(weights))

    def ask(
        kind: str, to: Iterable[str], facts: Mapping[str, Any], *, each: bool = False, arrays: Arrays | None = None
    ) -> dict[str, Any]:
        words = letters.ask(
            link, to, kind, timeout_s=job.round_timeout_s, place=place, facts=facts, each=each, arrays=arrays
        )
        found.answers |= {site: word.answer for site, word in words.items()}
        return {site: word.reply for site, word in words.items() if word.reply is not None}

    def facts_of(replies: Mapping[str, Any]) -> dict[str, Any]:
        return {site: reply.facts for site, reply in replies.items()}

    try:
        listed = steps.keys(facts_of(ask("mask.keys", sites, steps.begin())))
        shares = steps.shares(facts_of(ask("mask.shares", listed["keys"], listed)))
        if opened and set(shares) != set(opened):
            # Before training, which is paid for.
            raise FederationRefusedError(
                f"shares were asked for over {', '.join(sorted(opened))}, whose sum was lost, and not all are there",
                reason="too_few_sites",
            )
        replies = ask("train", shares, shares, each=True, arrays=weights)
        stay = steps.masked({site: _masked(reply.arrays) for site, reply in replies.items() if ARRAY in reply.arrays})
        # A site in the sum stays in it, whether it answers from here on or not.
        in_sum = {site: found.answers[site] for site in stay["stayed"]}
        opening = steps.agreed(facts_of(ask("mask.agree", stay["stayed"], stay)))
        before_open(list(stay["stayed"]))
        found.mean = steps.opened(facts_of(ask("mask.open", opening["signatures"], opening)))
        found.answers |= in_sum
    except FederationRefusedError as e:
        found.why = e.message
    for site, answer in found.answers.items():
        if answer.kind == "update" and (found.mean is None or site not in found.mean.stayed):
            why = steps.excluded.get(site, found.why or "its masked update is not in the sum")
            found.answers[site] = Answer(
                kind="bad_update" if site in steps.excluded else "no_answer", message=why[:300]
            )
    return found


def _masked(arrays: Arrays) -> npt.NDArray[Any]:
    return arrays[ARRAY]
