"""Whose a datum is, and whether the caller computed a loss over several of them.

The Tinker protocol has no privacy units, and a key's policy may leave nothing to its caller. Then units come as an
input that no loss reads, or follow from how scripts lay their data out: the datums of one prompt form a group,
neighbours a pair. Ids are keyed as those of native clients are, so a run can be driven through both doors.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from tg_tinker._arguments import keyed_units
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.datum import Datum
from tg_tinker.types.losses import CUSTOM, LOSSES, Loss
from tg_tinker.wire.calls import LossPass
from tg_tinker_server.engine.requests import OF_A_PROMPT, UNNAMED
from tg_tinker_server.service.policy import KeyPolicy
from tg_tinker_server.service.run import Run

UNIT_INPUTS = ("x_unit", "privacy_unit")
"""Names in ``loss_fn_inputs`` under which a datum carries the id of its privacy unit."""
REMEMBERED = 1 << 17
"""Datums of forward-only passes that are remembered for each run; beyond it the oldest are forgotten."""
UnitOf = Literal["datum", "ids", "prompt", "adjacent_pair"]
_SAMPLED = ("logprobs", "advantages", "sequence_ratio_mask")  # not 0 where a token was sampled, on some of them
_BY_UNIT: dict[str, UnitOf] = {"datum": "datum", "sequence": "datum", "group": "prompt", "pair": "adjacent_pair"}


def named(run: Run, call: LossPass, *, policy: KeyPolicy | None, finds_units: bool) -> LossPass:
    """A call with whose each datum is, by the rule that counts for its caller.

    Args:
        policy: of the caller's key; its ``unit_of`` is the rule. Without one the ids of the call count.
        finds_units: the call came through a door that has no ids of its own, so they are looked for in the datums.

    Raises:
        InvalidRequestError: ids that are not the caller's to give, or that are missing or cannot be read.
    """
    if run.private is None:
        return call
    if policy is not None:
        policy.refuse_named_units(call.units)
        if call.units is not None:
            if any(name in datum.loss_fn_inputs for name in UNIT_INPUTS for datum in call.data):
                raise InvalidRequestError(
                    f"the datums carry ids ({' or '.join(UNIT_INPUTS)}) beside privacy_unit_ids; give one of them",
                    field="privacy_unit_ids",
                    constraint="ids once",
                )
            return call
    if not finds_units and (policy is None or not call.train):
        return call
    try:
        return replace(call, units=units_of(run, call.data, call.loss, unit_of=policy.unit_of if policy else None))
    except InvalidRequestError:
        if call.train:
            raise
        return call  # to evaluate releases nothing; whose the datums are is only good to know


def units_of(
    run: Run, datums: Sequence[Datum], loss: Loss, *, unit_of: UnitOf | None = None
) -> tuple[str, ...] | None:
    """The name of the privacy unit of each datum; ``None``: each datum is its own, known by its content.

    Ids in the datums are what the caller says: all datums of a call carry one, or none does. Without ids a run whose
    privacy unit is a group takes for one unit what has the same prompt (the tokens up to the first sampled one, so
    only for losses on samples), and one whose unit is a pair each two neighbours; other units cannot be guessed. A
    prompt's name is that of all its data, wherever they come. A pair is known by its content, as a record is.

    Args:
        unit_of: what the key's policy says, and then nothing else counts: ids are looked at under "ids" only.

    Raises:
        InvalidRequestError: ids that are missing or cannot be read, an odd number of datums for pairs, or an RL datum
            whose prompt cannot be told.
    """
    if run.private is None:
        return None
    given = None
    if unit_of in (None, "ids"):
        given = _ids(datums)
        if given is None and unit_of is None:
            unit_of = _BY_UNIT.get(run.private.config.privacy_unit)
    key, count = run.mac("unit-ids", b""), len(datums)
    if given is not None:
        return keyed_units(key, given, count)
    if unit_of == "datum" or not datums:
        return None
    if unit_of == "prompt":
        prompts = ["prompt " + _digest(_prompt(datum, loss)) for datum in datums]
        return tuple(OF_A_PROMPT + name for name in keyed_units(key, prompts, count))
    if unit_of == "adjacent_pair":
        return tuple(UNNAMED + name for name in keyed_units(key, _pairs(datums), count))
    raise InvalidRequestError(
        f"privacy_unit={run.private.config.privacy_unit!r} needs to know whose each datum is: give every datum "
        'loss_fn_inputs["x_unit"], an int64 tensor that is the same for all datums of a unit (or privacy_unit_ids '
        "through tg_tinker)",
        field="loss_fn_inputs.x_unit",
        constraint="in every datum",
    )


def _ids(datums: Sequence[Datum]) -> tuple[str, ...] | None:
    found = [[n for n in UNIT_INPUTS if n in d.loss_fn_inputs] for d in datums]
    if not any(found):
        return None
    if not all(len(names) == 1 for names in found) or len({names[0] for names in found}) != 1:
        raise InvalidRequestError(
            f"{sum(1 for names in found if names)} of {len(datums)} datums carry the id of a privacy unit; give all "
            f"of them one under the same name ({' or '.join(UNIT_INPUTS)}), or none, so that no unit counts twice",
            field=f"loss_fn_inputs.{UNIT_INPUTS[0]}",
            constraint="in every datum of a call or in none, under one name",
        )
    name = found[0][0]
    ids = []
    for datum in datums:
        tensor = datum.loss_fn_inputs[name]
        values = tensor.to_numpy().reshape(-1)
        if tensor.dtype != "int64" or values.size == 0:
            raise InvalidRequestError(
                f"loss_fn_inputs[{name!r}] is {tensor.dtype} {tensor.shape}; the id of a privacy unit is an int64 "
                "tensor of at least one number",
                field=f"loss_fn_inputs.{name}",
                constraint="int64, not empty",
            )
        ids.append(",".join(str(int(v)) for v in values))
    return tuple(ids)


def _prompt(datum: Datum, loss: Loss) -> bytes:
    """The tokens up to the first one that was sampled: what all answers to one prompt begin with.

    Position i predicts target i, which is token i + 1: with its first sampled target at i the prompt is 0 to i. A
    prompt's own positions have no log-probability, no advantage and no mask. The first that has any of them ends it:
    taken too short a prompt holds more data, never less.
    """
    inputs = datum.loss_fn_inputs
    if loss.name == CUSTOM or "logprobs" not in LOSSES[loss.name].required or "logprobs" not in inputs:
        raise _unknown_prompt(f"for loss {loss.name} it is not known where a prompt ends")
    tokens = np.asarray(datum.model_input.to_ints(), dtype="<i8")
    starts = [np.flatnonzero(inputs[name].to_numpy().reshape(-1)) for name in _SAMPLED if name in inputs]
    firsts = [int(start[0]) for start in starts if start.size]
    if not firsts:
        raise _unknown_prompt(f"a datum has zeros only for {', '.join(_SAMPLED)}, so its answer cannot be told")
    return tokens[: min(firsts) + 1].tobytes()


def _unknown_prompt(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f'the privacy unit is all datums of one prompt, and {why}; give every datum loss_fn_inputs["x_unit"] (a key '
        "whose policy names units by prompts cannot: it trains on sampled answers only)",
        field="loss_fn_inputs.x_unit",
        constraint="in every datum",
    )


def _pairs(datums: Sequence[Datum]) -> tuple[str, ...]:
    if len(datums) % 2:
        raise InvalidRequestError(
            f"the privacy unit is a pair of neighbouring datums, but the call has {len(datums)}; send both of every "
            'pair in one call, one after the other, or give every datum loss_fn_inputs["x_unit"]',
            field="data",
            constraint="an even number of datums",
        )
    seen: Counter[str] = Counter()
    names: list[str] = []
    for one, other in zip(datums[::2], datums[1::2], strict=True):
        content = _digest(_tokens(one) + b"|" + _tokens(other))
        names += [f"pair {content} {seen[content]}"] * 2  # equal pairs of one call are different ones
        seen[content] += 1
    return tuple(names)


def _tokens(datum: Datum) -> bytes:
    tokens = np.asarray(datum.model_input.to_ints(), dtype="<i8")
    return len(tokens).to_bytes(8, "little") + tokens.tobytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Seen(NamedTuple):
    """A datum of a forward-only pass: a digest of what a loss may read, and whether no other unit was in its call.

    Attributes:
        order: of its call among the run's forward-only passes.
    """

    inputs: bytes
    alone: bool
    order: int


@dataclass(slots=True)
class PassWatch:
    """Finds losses that a client computed itself from the log-probabilities of a whole call.

    SDKs do it in two calls: ``forward``, then ``forward_backward`` on the same datums with weights that are the
    derivative of the loss. Such a weight may depend on every record of the call, so clipping records one by one
    bounds nothing. Watched are forward-only passes, by keyed digests; ask in the run's order.

    It recognises what honest scripts do. A client that means to hide it can (it may compute weights from a sampler's
    log-probabilities), which is why whoever sends the data is trusted with it.
    """

    _seen: weakref.WeakKeyDictionary[Run, OrderedDict[bytes, _Seen]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def coupling_of(self, run: Run, call: LossPass) -> Literal["independent", "batch"]:
        """Whether the inputs of a datum were computed from others than those of its own unit. Remembers forwards.

        ``call.units`` are known by now. "independent" where nothing can be coupled: runs without privacy, and calls
        of one unit; and where the run's ``DPConfig.custom_loss`` attests it. Losses that are usually computed over a
        group are judged by the service.
        """
        if run.private is None or call.coupling == "batch":
            return call.coupling
        alone = len(call.data if call.units is None else set(call.units)) <= 1
        if not call.train:
            self._remember(run, call, alone)
            return "independent"
        judged = call.loss.name != CUSTOM and LOSSES[call.loss.name].coupling == "group"
        if judged or run.private.config.custom_loss == "independent":
            return "independent"
        seen = self._seen.get(run, OrderedDict())
        newest = next(reversed(seen.values())).order if seen else 0
        computed = (_computed(run, datum, seen, newest if alone else None) for datum in call.data)
        return "batch" if any(computed) else "independent"

    def _remember(self, run: Run, call: LossPass, alone: bool) -> None:
        seen = self._seen.setdefault(run, OrderedDict())
        order = next(reversed(seen.values())).order + 1 if seen else 0
        for datum in call.data:
            what, inputs = _fingerprint(run, datum)
            seen[what] = _Seen(inputs, alone, order)
            seen.move_to_end(what)
        while len(seen) > REMEMBERED:
            seen.popitem(last=False)


def _computed(run: Run, datum: Datum, seen: Mapping[bytes, _Seen], newest: int | None) -> bool:
    """Whether a datum's inputs look like a derivative of a loss over others.

    That are negative weights, or others than at its forward. What a run saw before it came from disk is not known:
    until its next step uneven weights are as suspicious. A unit whose forward was alone and the last one before its
    backward may have any weights: an honest script had nothing else to compute them from.

    Args:
        newest: order of the run's last forward-only pass, if this call is of one unit.
    """
    what, inputs = _fingerprint(run, datum)
    before = seen.get(what)
    if before is not None and before.alone and before.order == newest:
        return False
    tensor = datum.loss_fn_inputs.get("weights")
    weights = np.zeros(0) if tensor is None else tensor.to_numpy()
    if bool((weights < 0).any()):
        return True
    if before is not None:
        return before.inputs != inputs
    return run.restored and newest is None and len(set(weights[weights != 0].tolist())) > 1


def _fingerprint(run: Run, datum: Datum) -> tuple[bytes, bytes]:
    """Keyed digests of what the model reads and predicts, and of everything else a loss may read."""
    targets = datum.loss_fn_inputs.get("target_tokens")
    what = _tokens(datum) + (b"" if targets is None else targets.to_numpy().astype("<i8").tobytes())
    rest = hashlib.sha256()
    for name in sorted(set(datum.loss_fn_inputs) - {"target_tokens", *UNIT_INPUTS}):
        rest.update(name.encode() + b"\x00" + np.ascontiguousarray(datum.loss_fn_inputs[name].to_numpy()).tobytes())
    return run.mac("watched datum", what)[:16], run.mac("watched inputs", rest.digest())[:16]


__all__ = ["UNIT_INPUTS", "PassWatch", "UnitOf", "named", "units_of"]
