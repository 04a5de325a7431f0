"""What a pass, or rows in its place, may bring into a logical batch: form, sizes, units. Refused before any work."""

from __future__ import annotations

from tg_tinker.errors import InvalidRequestError
from tg_tinker.wire.calls import LossPass, Pass
from tg_tinker_server.service.fitting import PassLimits
from tg_tinker_server.service.run import Run


def refuse_mixture(run: Run, request: Pass | LossPass) -> None:
    """Refuse a batch where datums are pending, and datums where a batch is.

    Raises:
        InvalidRequestError: they are of different forms.
    """
    if run.pending is not None and run.pending is not type(request):
        raise InvalidRequestError(
            "a logical batch is made of batches or of datums, not of both: the loss of a batch is a mean over "
            "records, that of datums a sum. Call optim_step between them",
            field="data",
            constraint="one form per optim_step",
        )


def refuse_if_drawn_here(run: Run, *, field: str) -> None:
    """Refuse what callers send where the server draws.

    Raises:
        InvalidRequestError: it does.
    """
    if run.private is not None and run.private.drawn_here:
        raise InvalidRequestError(
            f"the server draws the batches of this run from dataset {run.private.scope.dataset_id}; call "
            "forward_backward(dataset=...). To choose batches yourself, create the run with "
            "DPConfig(sampling='none'), which claims no amplification",
            field=field,
            constraint="drawn by the server",
        )


def check_batch(run: Run, request: Pass, limits: PassLimits) -> None:
    """Refuse a batch that this run, or this server, cannot take.

    Raises:
        InvalidRequestError: naming the field.
    """
    records, tokens = request.batch.input_ids.shape
    if request.train:
        refuse_if_drawn_here(run, field="batch")
    if (records == 0 or tokens == 0) and not may_be_empty(run, request):
        raise InvalidRequestError(
            "the batch is empty; only a Poisson draw (DPConfig.sampling='poisson') may be",
            field="batch.input_ids",
            constraint="at least one record of one token",
        )
    refuse_too_many(records, limits, "forward_backward", field="batch.input_ids")
    if records * tokens > limits.max_tokens:
        raise InvalidRequestError(
            f"the batch has {records * tokens} tokens with padding, over the {limits.max_tokens} of one "
            "call; split it into several forward_backward calls, they add up",
            field="batch.input_ids",
            constraint=f"at most {limits.max_tokens} tokens with padding",
        )
    if tokens > run.config.max_sequence_length:
        raise InvalidRequestError(
            f"records of {tokens} tokens are longer than max_sequence_length={run.config.max_sequence_length}; "
            "cut them yourself, nothing is cut silently",
            field="batch.input_ids",
            constraint=f"at most {run.config.max_sequence_length} tokens",
        )
    check_units(run, request, records)


def may_be_empty(run: Run, request: Pass | LossPass) -> bool:
    """Whether a pass over nothing means something: a Poisson draw may come out empty."""
    return request.train and run.private is not None and run.private.config.sampling == "poisson"


def check_units(run: Run, request: Pass | LossPass, records: int) -> None:
    """Refuse units that are not one per record, or missing where the run bounds what a unit contributes.

    Raises:
        InvalidRequestError: they are.
    """
    units, private = request.units, run.private
    if units is not None and len(units) != records:
        raise InvalidRequestError(
            f"{len(units)} privacy_unit_ids for {records} records",
            field="privacy_unit_ids",
            constraint="one per record",
        )
    needs_units = private is not None and request.train and private.config.privacy_unit != "datum"
    if needs_units and units is None and records:
        assert private is not None
        raise InvalidRequestError(
            f"privacy_unit={private.config.privacy_unit!r} needs privacy_unit_ids: say whose each record is",
            field="privacy_unit_ids",
            constraint="one per record",
        )


def refuse_too_many(records: int, limits: PassLimits, operation: str, *, field: str) -> None:
    """Refuse more records than one call may have.

    Raises:
        InvalidRequestError: there are more.
    """
    if records > limits.max_records:
        raise InvalidRequestError(
            f"the batch has {records} records, over the {limits.max_records} of one call; split it into "
            f"several {operation} calls, they add up",
            field=field,
            constraint=f"at most {limits.max_records} records",
        )
