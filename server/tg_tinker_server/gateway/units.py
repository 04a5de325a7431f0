"""Whose a datum is that came in the Tinker protocol, and whether the caller computed a loss over several of them.

The protocol has no privacy units. They come as an input that no loss reads, or follow from how scripts lay their data
out: the datums of one prompt form a group, neighbours a pair. Ids are keyed as those of native clients are, so a run
can be driven through both doors.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tg_tinker._arguments import keyed_units
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.datum import Datum
from tg_tinker.types.losses import CUSTOM, LOSSES, Loss
from tg_tinker.wire.calls import LossPass
from tg_tinker_server.service.run import Run

UNIT_INPUTS = ("x_unit", "privacy_unit")
"""Names in ``loss_fn_inputs`` under which a datum carries the id of its privacy unit."""
REMEMBERED = 1 << 17
"""Datums of forward-only passes that are remembered for each run; beyond it the oldest are forgotten."""
UnitOf = Literal["datum", "ids", "prompt", "adjacent_pair"]
CustomLoss = Literal["refuse", "independent"]
_BY_UNIT: dict[str, UnitOf] = {"datum": "datum", "sequence": "datum", "group": "prompt", "pair": "adjacent_pair"}


def units_of(
    run: Run, datums: Sequence[Datum], loss: Loss, *, unit_of: UnitOf | None = None
) -> tuple[str, ...] | None:
    """The keyed id of the privacy unit of each datum; ``None``: each datum is its own, known by its content.

    Ids in the datums are what the caller says: all datums of a call carry one, or none does. Without ids a run whose
    privacy unit is a group takes for one unit what has the same prompt (the tokens up to the first sampled one, so
    only for losses on samples), and one whose unit is a pair each two neighbours; other units cannot be guessed.

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
    if given is not None:
        names = given
    elif unit_of == "datum":
        return None
    elif unit_of == "prompt":
        names = tuple("prompt " + _digest(_prompt(datum, loss)) for datum in datums)
    elif unit_of == "adjacent_pair":
        names = _pairs(datums)
    elif not datums:
        return None
    else:
        raise InvalidRequestError(
            f"privacy_unit={run.private.config.privacy_unit!r} needs to know whose each datum is: give every datum "
            'loss_fn_inputs["x_unit"], an int64 tensor that is the same for all datums of a unit',
            field="loss_fn_inputs.x_unit",
            constraint="in every datum",
        )
    return keyed_units(run.mac("unit-ids", b""), names, len(datums))


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
        ids.append("id " + ",".join(str(int(v)) for v in values))
    return tuple(ids)


def _prompt(datum: Datum, loss: Loss) -> bytes:
    """The tokens up to the first one that was sampled: what all answers to one prompt begin with.

    Position i predicts target i, which is token i + 1: with its first sampled target at i the prompt is 0 to i. A
    prompt's own positions have the log-probability 0. A sampled token whose log-probability is 0 was certain, so all
    answers to the prompt begin with it.
    """
    if loss.name == CUSTOM or "logprobs" not in LOSSES[loss.name].required or "logprobs" not in datum.loss_fn_inputs:
        raise InvalidRequestError(
            f"the privacy unit is all datums of one prompt, and for loss {loss.name} it is not known where a prompt "
            'ends; give every datum loss_fn_inputs["x_unit"] (a key whose policy names units by prompts cannot: it '
            "trains on sampled answers only)",
            field="loss_fn_inputs.x_unit",
            constraint="in every datum",
        )
    tokens = np.asarray(datum.model_input.to_ints(), dtype="<i8")
    sampled = np.flatnonzero(datum.loss_fn_inputs["logprobs"].to_numpy().reshape(-1))
    return tokens[: int(sampled[0]) + 1 if sampled.size else len(tokens)].tobytes()


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


@dataclass(slots=True)
class PassWatch:
    """Finds losses that a client computed itself from the log-probabilities of a whole call.

    The SDK does it in two calls: ``forward``, then ``forward_backward`` on the same datums with weights that are the
    derivative of the loss. Such a weight may depend on every record of the call, so clipping records one by one
    bounds nothing. Watched are forward-only passes since the last step, by keyed digests; ask in the run's order.

    It recognises what honest scripts do. A client that means to hide it can (it may compute weights from a sampler's
    log-probabilities), which is why whoever sends the data is trusted with it.
    """

    _seen: dict[tuple[str, str], OrderedDict[bytes, bytes]] = field(default_factory=dict)

    def coupling_of(
        self, run: Run, call: LossPass, *, custom_loss: CustomLoss = "refuse"
    ) -> Literal["independent", "batch"]:
        """Whether the inputs of a datum were computed from others than those of its own unit. Remembers forwards.

        "independent" where nothing can be coupled that is not one unit: runs without privacy, runs whose unit is a
        group or a pair, and keys whose policy attests it (``custom_loss="independent"``). Losses that are usually
        computed over a group are judged by the service.
        """
        if run.private is None:
            return "independent"
        if not call.train:
            self._remember(run, call)
            return "independent"
        contained = run.private.config.privacy_unit not in ("datum", "sequence")
        judged = call.loss.name != CUSTOM and LOSSES[call.loss.name].coupling == "group"
        if contained or judged or custom_loss == "independent":
            return "independent"
        seen: Mapping[bytes, bytes] = self._seen.get((run.tenant, run.run_id), {})
        return "batch" if any(_computed(run, datum, seen) for datum in call.data) else "independent"

    def _remember(self, run: Run, call: LossPass) -> None:
        seen = self._seen.setdefault((run.tenant, run.run_id), OrderedDict())
        for datum in call.data:
            what, inputs = _fingerprint(run, datum)
            seen[what] = inputs
            seen.move_to_end(what)
        while len(seen) > REMEMBERED:
            seen.popitem(last=False)

    def stepped(self, run: Run) -> None:
        """A step was taken: what was seen before it is over."""
        self._seen.pop((run.tenant, run.run_id), None)

    def forget(self, tenant: str, run_id: str) -> None:
        """The run is gone."""
        self._seen.pop((tenant, run_id), None)


def _computed(run: Run, datum: Datum, seen: Mapping[bytes, bytes]) -> bool:
    """Whether a datum's inputs look like a derivative of a loss: negative weights, or others than at its forward."""
    weights = datum.loss_fn_inputs.get("weights")
    if weights is not None and bool((weights.to_numpy() < 0).any()):
        return True
    what, inputs = _fingerprint(run, datum)
    return seen.get(what, inputs) != inputs


def _fingerprint(run: Run, datum: Datum) -> tuple[bytes, bytes]:
    """Keyed digests of what the model reads and predicts, and of everything else a loss may read."""
    targets = datum.loss_fn_inputs.get("target_tokens")
    what = _tokens(datum) + (b"" if targets is None else targets.to_numpy().astype("<i8").tobytes())
    rest = hashlib.sha256()
    for name in sorted(set(datum.loss_fn_inputs) - {"target_tokens", *UNIT_INPUTS}):
        rest.update(name.encode() + b"\x00" + np.ascontiguousarray(datum.loss_fn_inputs[name].to_numpy()).tobytes())
    return run.mac("watched datum", what)[:16], run.mac("watched inputs", rest.digest())[:16]


__all__ = ["UNIT_INPUTS", "CustomLoss", "PassWatch", "UnitOf", "units_of"]
