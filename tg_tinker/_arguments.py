"""From what a person writes to a call: prompts, sampling options, names, privacy units."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
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


def texts(stop_sequences: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop sequences; a string is one."""
    return (stop_sequences,) if isinstance(stop_sequences, str) else tuple(stop_sequences or ())


def saving(include_optimizer: bool | str, metadata: Mapping[str, Any] | None, name: str | None) -> Save:
    """The call of ``save_state``; a text in the first place is the name."""
    if isinstance(include_optimizer, str):
        return Save(metadata=metadata or {}, name=name or include_optimizer)
    return Save(include_optimizer=bool(include_optimizer), metadata=metadata or {}, name=name or "")


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
