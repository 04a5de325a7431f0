"""Does a batch fit this run? Checked with NumPy alone, before any model work.

Shape suffixes: B records, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from typing import Literal

import numpy as np

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import IGNORE_INDEX, TrainingConfig
from tg_tinker_server.engine.backend import Ints, LossRequest, PassRequest, Request

# How the name of a unit begins that nobody gave an id; ids of clients are hexadecimal MACs.
UNNAMED = "record "  # its content
OF_A_PROMPT = "prompt "  # the prompt that all of its data answer


def _refuse(message: str, field: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field=field, constraint=constraint)


def _check_shapes(request: PassRequest) -> None:
    ids = request.input_ids_BT
    for name, array in (
        ("input_ids", ids),
        ("attention_mask", request.attention_mask_BT),
        ("labels", request.labels_BT),
    ):
        field = f"batch.{name}"
        if array.ndim != 2:
            raise _refuse(f"{name} must be [records, tokens]", field, "two dimensions [records, tokens]")
        if not np.issubdtype(array.dtype, np.integer):
            raise _refuse(f"{name} has dtype {array.dtype}; it must be integer", field, "integer dtype")
        if array.shape != ids.shape:
            raise _refuse(
                f"{name} has shape {list(array.shape)} but input_ids has {list(ids.shape)}",
                field,
                "same shape as input_ids",
            )


def _check_range(name: str, values: Ints, vocab_size: int) -> None:
    outside = (values < 0) | (values >= vocab_size)
    if outside.any():
        # Positions and counts only: the id itself is content.
        raise _refuse(
            f"{name} holds {int(outside.sum())} id(s) outside the model's vocabulary of {vocab_size}",
            f"batch.{name}",
            f"0 <= id < {vocab_size}",
        )


def check_request(request: PassRequest, config: TrainingConfig, *, vocab_size: int, max_positions: int) -> None:
    """Raise InvalidRequestError with field and constraint unless the batch fits.

    An empty batch fits only where Poisson sampling may draw one.
    """
    _check_shapes(request)
    records, tokens = request.input_ids_BT.shape
    if records == 0:
        dp = config.dp_config
        if not (config.private and dp is not None and dp.sampling == "poisson"):
            raise _refuse("the batch holds no record", "batch.input_ids", "at least one record")
    elif tokens == 0:
        raise _refuse("the records of the batch hold no token", "batch.input_ids", "at least one token")
    if tokens > max_positions:
        raise _refuse(
            f"records of {tokens} tokens are longer than this run's {max_positions}; shorten or split them "
            "(nothing is cut silently)",
            "batch.input_ids",
            f"at most {max_positions} tokens",
        )
    _check_range("input_ids", request.input_ids_BT, vocab_size)
    mask = request.attention_mask_BT
    if ((mask != 0) & (mask != 1)).any():
        raise _refuse("attention_mask holds values other than 0 and 1", "batch.attention_mask", "0 or 1")
    labels = request.labels_BT
    _check_range("labels", labels[labels != IGNORE_INDEX], vocab_size)
    if request.units is not None and len(request.units) != records:
        raise _refuse(
            f"{len(request.units)} privacy unit ids for {records} records",
            "privacy_unit_ids",
            "one id per record",
        )


def units_of(request: Request) -> tuple[tuple[str, ...], Ints]:
    """The distinct units of a batch or of datums in order of appearance, and each record's place among them [B].

    Without ids a record is known by its content, the tokens that the model reads: equal records of one call are
    different units, and the same record in another call of the logical batch is the same unit again, as after a
    repeated call.
    """
    names = request.units if request.units is not None else _named_by_content(request)
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return tuple(order), np.array([order[name] for name in names], dtype=np.int64)


def naming_of(unit: str) -> Literal["content", "prompt", "id"]:
    """How a unit got its name: the same person under names of two kinds would be two units."""
    if unit.startswith(UNNAMED):
        return "content"
    return "prompt" if unit.startswith(OF_A_PROMPT) else "id"


def tokens_of(request: Request) -> list[Ints]:
    """The tokens of each record, wherever padding stands."""
    if isinstance(request, LossRequest):
        return list(request.tokens)
    return [ids_T[mask_T == 1] for ids_T, mask_T in zip(request.input_ids_BT, request.attention_mask_BT, strict=True)]


def _named_by_content(request: Request) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    names = []
    for tokens in tokens_of(request):
        content = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
        names.append(f"{UNNAMED}{content} {seen[content]}")
        seen[content] += 1
    return tuple(names)


def without_leading_padding(request: PassRequest) -> PassRequest:
    """The same records, each beginning at its first real token.

    A record then means the same however wide the batch is that it came in: models that count positions from the
    first column would see it shifted by the longest of its neighbours. Padding in front predicts nothing any more.
    """
    mask_BT = request.attention_mask_BT != 0
    starts_B = (
        np.where(mask_BT.any(axis=1), mask_BT.argmax(axis=1), 0) if mask_BT.size else np.zeros(0, dtype=np.int64)
    )
    if not starts_B.any():
        return request
    tokens = mask_BT.shape[1]
    columns_BT = np.arange(tokens) + starts_B[:, None]
    inside_BT = columns_BT < tokens

    def shifted(array_BT: Ints, fill: int) -> Ints:
        moved: Ints = np.where(inside_BT, np.take_along_axis(array_BT, columns_BT % tokens, axis=1), fill)
        return moved

    return dataclasses.replace(
        request,
        input_ids_BT=shifted(request.input_ids_BT, 0),
        attention_mask_BT=shifted(request.attention_mask_BT, 0),
        labels_BT=shifted(request.labels_BT, IGNORE_INDEX),
    )
