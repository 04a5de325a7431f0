"""From what a person writes to a call: prompts, sampling options, names, privacy units."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import LoRAConfig
from tg_tinker.types.datum import Datum
from tg_tinker.types.optim import AdamParams
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.wire.calls import Generate, Save, Updates

_UNIT_DOMAIN = b"tg-tinker/unit/v1\x00"


def generation(prompts: str | Sequence[str], num_completions: int, **options: Any) -> Generate:
    """The call of ``sample``; a string is one prompt.

    Raises:
        InvalidRequestError: naming the argument that is wrong.
    """
    given = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not given or not all(isinstance(t, str) for t in given):
        raise InvalidRequestError(
            "prompts must be a string or a list of at least one string",
            field="prompts",
            constraint="at least one string",
        )
    if num_completions < 1:
        raise InvalidRequestError(
            "num_completions must be at least 1", field="num_completions", constraint="at least 1"
        )
    return Generate(prompts=given, params=sampling_params(options), num_completions=num_completions)


def sampling_params(options: Mapping[str, Any]) -> GenerationOptions:
    """Checked sampling options.

    Raises:
        InvalidRequestError: an unknown name, or a value that is out of range or of the wrong type.
    """
    try:
        return GenerationOptions(**options)
    except TypeError as e:  # an unknown name, or a value that cannot be compared with a number
        raise InvalidRequestError(
            f"sampling options: {e}", field="sampling options", constraint="the options of sample()"
        ) from e


def stops(stop_sequences: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop sequences; a string is one."""
    return (stop_sequences,) if isinstance(stop_sequences, str) else tuple(stop_sequences or ())


def saving(
    include_optimizer: bool | str,
    metadata: Mapping[str, Any] | int | None,
    name: str | None,
    *,
    ttl_seconds: int | None = None,
    overwrite: bool = False,
) -> Save:
    """The call of ``save_state``; a text in the first place is the name, a number in the second how long it is kept.

    Raises:
        InvalidRequestError: something is given twice.
    """
    named, lives = isinstance(include_optimizer, str), isinstance(metadata, int)
    for what, twice in (("name", named and name is not None), ("ttl_seconds", lives and ttl_seconds is not None)):
        if twice:
            raise InvalidRequestError(f"{what} is given twice", field=what, constraint="once")
    return Save(
        include_optimizer=True if isinstance(include_optimizer, str) else bool(include_optimizer),
        metadata={} if isinstance(metadata, int) or metadata is None else metadata,
        name=(include_optimizer if isinstance(include_optimizer, str) else name) or "",
        ttl_seconds=metadata if isinstance(metadata, int) else ttl_seconds,
        overwrite=overwrite,
    )


def datums_of(data: Any) -> list[Datum]:
    """A list of datums.

    Raises:
        InvalidRequestError: it is none.
    """
    if isinstance(data, str | bytes) or not isinstance(data, Sequence):
        raise InvalidRequestError(
            f"a batch is a BatchData, a dict or a list of Datum, not a {type(data).__name__}",
            field="batch",
            constraint="BatchData, dict or list of Datum",
        )
    for datum in data:
        if not isinstance(datum, Datum):
            hint = (
                "; give one dict of arrays [records, tokens], or tg_tinker.collate(records)"
                if isinstance(datum, Mapping)
                else ""
            )
            raise InvalidRequestError(
                f"the list holds a {type(datum).__name__}, not a Datum{hint}",
                field="batch",
                constraint="BatchData, dict or list of Datum",
            )
    return list(data)


def lora_config(rank: int, *, train_mlp: bool, train_attn: bool, train_unembed: bool) -> LoRAConfig:
    """An adapter on groups of modules, which the server finds by name.

    Raises:
        InvalidRequestError: nothing would be trained.
    """
    groups = {"@mlp": train_mlp, "@attention": train_attn, "@unembed": train_unembed}
    if not any(groups.values()):
        raise InvalidRequestError(
            "nothing would be trained: set at least one of train_mlp, train_attn and train_unembed",
            field="train_attn",
            constraint="at least one",
        )
    return LoRAConfig(rank=rank, alpha=32, target_modules=[name for name, wanted in groups.items() if wanted])


def adam_of(
    apply_dp_noise: bool | AdamParams, adam_params: AdamParams | None, optim_params: AdamParams | None
) -> tuple[bool, AdamParams | None]:
    """Whether noise is applied, and the settings of the step.

    Raises:
        InvalidRequestError: settings are given twice, or are no AdamParams.
    """
    first = None if isinstance(apply_dp_noise, bool | int) else apply_dp_noise
    given = [p for p in (first, adam_params, optim_params) if p is not None]
    if len(given) > 1 or not all(isinstance(p, AdamParams) for p in given):
        raise InvalidRequestError(
            "optim_step takes AdamParams once", field="adam_params", constraint="one AdamParams, or none"
        )
    return (True if first is not None else bool(apply_dp_noise)), given[0] if given else None


def updates(key: bytes, vectors: npt.NDArray[np.float32], unit_ids: Sequence[str]) -> Updates:
    """The call of ``add_updates``.

    Raises:
        InvalidRequestError: not float32 [rows, parameters], or not one unit for each row.
    """
    if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32 or vectors.ndim != 2:
        found = (
            f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, np.ndarray) else type(vectors).__name__
        )
        raise InvalidRequestError(
            f"vectors are {found}; pass a numpy array of float32 [rows, parameters]",
            field="vectors",
            constraint="float32 [rows, parameters]",
        )
    return Updates(vectors_UP=vectors, units=keyed_units(key, unit_ids, len(vectors)))


def keyed_units(key: bytes, unit_ids: Sequence[str], num_records: int) -> tuple[str, ...]:
    """HMAC-SHA256 of each unit id under the run's key, in hex: the server can count units and not name them.

    Raises:
        InvalidRequestError: not one non-empty string per record.
    """
    if isinstance(unit_ids, str) or not all(isinstance(u, str) and u for u in unit_ids):
        raise InvalidRequestError(
            "privacy_unit_ids is a list of non-empty strings, one per record",
            field="privacy_unit_ids",
            constraint="one per record",
        )
    if len(unit_ids) != num_records:
        raise InvalidRequestError(
            f"{len(unit_ids)} privacy_unit_ids for {num_records} records",
            field="privacy_unit_ids",
            constraint="one per record",
        )
    return tuple(hmac.new(key, _UNIT_DOMAIN + u.encode(), hashlib.sha256).hexdigest() for u in unit_ids)
