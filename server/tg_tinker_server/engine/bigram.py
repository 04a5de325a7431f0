"""A Backend in NumPy: a bigram over bytes, small enough for every test and under all the same rules.

The next token's logits are a fixed table's row plus a trained table's row, both chosen by the current token.

Shape suffixes: B records, T tokens, V vocabulary, U units, P parameters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import IGNORE_INDEX, OptimizerConfig, TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker.types.losses import CUSTOM
from tg_tinker_server.dp.clipping import clip_and_sum
from tg_tinker_server.engine import numpy_optimizers
from tg_tinker_server.engine.backend import EngineState, Ints, LossRequest, PassRequest, PassResult, Request
from tg_tinker_server.engine.gradients import Floats, Form, GradientContribution, ParamLayout
from tg_tinker_server.engine.loss_fns import closed_form
from tg_tinker_server.engine.loss_fns.values import Array, DatumLoss, joined_metrics, total
from tg_tinker_server.engine.requests import units_of
from tg_tinker_server.engine.sampling.bigram_rows import BigramRows, BigramWeights
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler
from tg_tinker_server.engine.session_core import SessionCore, derived_seed, ensure_finite, ensure_finite_pass
from tg_tinker_server.engine.state import OPTIMIZER, WEIGHTS, checked_optimizer, checked_weights
from tg_tinker_server.engine.tokenizers import ByteTokenizer
from tg_tinker_server.engine.whole_pass import WholePass

MODEL_NAME = "bigram"
_TABLE = "table"
# Its one table answers to the usual names of a transformer's layers, so that default configurations run on it.
TARGET_MODULES = (_TABLE, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET_GROUPS = ("@attention", "@mlp", "@unembed")
_V = ByteTokenizer.vocab_size
_POSITIONS = 4096
_UNITS_AT_ONCE = 16


class BigramBackend:
    """Offers the model "bigram"; its fixed table is the same in every process."""

    def __init__(self) -> None:
        # Mild preferences, so that samples differ from noise and a fresh model has something to unlearn.
        self._base_VV = np.random.default_rng(20).normal(0.0, 0.5, (_V, _V))
        self._base_VV.setflags(write=False)

    def models(self) -> list[ModelInfo]:
        """See ``backend.Backend``."""
        return [ModelInfo(name=MODEL_NAME, family="bigram", parameters=_V * _V, max_sequence_length=_POSITIONS)]

    def open(self, *, run_id: str, config: TrainingConfig) -> BigramSession:  # noqa: ARG002 - part of the seam
        """See ``backend.Backend``."""
        _require_model(config)
        targets = config.lora_config.target_modules if config.lora_config else []
        known = (*TARGET_MODULES, *TARGET_GROUPS)
        unknown = [t for t in targets if t not in known] if targets != "all-linear" else []
        if unknown:
            raise InvalidRequestError(
                f"target module {unknown[0]!r} does not exist in {MODEL_NAME}; it has {', '.join(TARGET_MODULES)}",
                field="lora_config.target_modules",
                constraint="one of: " + ", ".join(TARGET_MODULES),
            )
        if config.lora_config is not None and config.lora_config.frozen_factor is not None:
            raise InvalidRequestError(
                f"{MODEL_NAME} trains one whole table, which has no factors A and B; leave frozen_factor out, or "
                "take a server with backend 'torch'",
                field="lora_config.frozen_factor",
                constraint=f"none for {MODEL_NAME}",
            )
        return BigramSession(self._base_VV, config)

    def open_weights(self, config: TrainingConfig, state: EngineState | None) -> BigramWeights:
        """See ``sampling.seam.SamplingBackend``."""
        _require_model(config)
        layout = ParamLayout({_TABLE: (_V, _V)})
        table_VV = None if state is None else checked_weights(state, layout)[_TABLE]
        return BigramWeights(self._base_VV, table_VV, max_positions=_POSITIONS)

    def token_sampler(self) -> BatchedSampler:
        """See ``sampling.seam.SamplingBackend``."""
        return BatchedSampler(BigramRows(), most_rows=64, prefix_bytes=2**20)


class BigramSession(SessionCore):
    """See ``backend.Session``."""

    def __init__(self, base_VV: Floats, config: TrainingConfig) -> None:
        super().__init__(
            config=config,
            layout=ParamLayout({_TABLE: (_V, _V)}),
            tokenizer=ByteTokenizer(),
            vocab_size=_V,
            model_positions=_POSITIONS,
            base_dtype="float32",
        )
        self._base_VV = base_VV
        self._weights_VV: npt.NDArray[np.float32] = np.zeros((_V, _V), dtype=np.float32)
        self._live = BigramWeights(base_VV, self._weights_VV, max_positions=_POSITIONS)
        self._optimizer_state: dict[str, npt.NDArray[np.float32]] = {}
        # Under privacy the masks of a record must not be computable by others: one more secret part of the seed.
        self._dropout_key = os.urandom(16).hex() if config.private else ""

    def start(self, request: Request) -> WholePass:
        """See ``backend.Session``."""
        self.ensure_open()
        self.check(request)
        return WholePass(lambda: self._compute(request))

    def _compute(self, request: Request) -> PassResult:
        self.ensure_open()
        return self._datums(request) if isinstance(request, LossRequest) else self._batch(request)

    def _batch(self, request: PassRequest) -> PassResult:
        units, unit_of_B = units_of(request)
        drops_BT = self._dropout(request, request.input_ids_BT.shape)
        labels_BT = request.labels_BT[:, 1:]
        records = len(unit_of_B)
        means_B, sums_B = np.zeros(records), np.zeros(records)
        errors: list[tuple[Any, Any]] = []
        for i in range(records):
            at = np.flatnonzero(labels_BT[i] != IGNORE_INDEX)
            if not at.size:
                errors.append((np.zeros(0, dtype=np.int64), np.zeros((0, _V))))
                continue
            tokens, drop = request.input_ids_BT[i, at], drops_BT[i, at, None]
            logits = self._base_VV[tokens] + drop * self._weights_VV[tokens]
            log_probs = logits - _log_sum_exp(logits)
            targets = labels_BT[i, at]
            losses = -log_probs[np.arange(at.size), targets]
            sums_B[i], means_B[i] = losses.sum(), losses.mean()
            error = np.exp(log_probs)
            error[np.arange(at.size), targets] -= 1.0
            errors.append((tokens, drop * error / at.size))
        contribution = self._contribution(units, unit_of_B, errors) if request.train else None
        loss = math.fsum(means_B) / max(1, records)
        if not self._config.private:
            ensure_finite_pass(loss, contribution.sum_P if contribution else None)
        return PassResult(
            loss=loss,
            loss_sum=math.fsum(sums_B),
            num_targets=int((labels_BT != IGNORE_INDEX).sum()),
            num_tokens=int(request.attention_mask_BT.sum()),
            num_records=records,
            contribution=contribution,
        )

    def _datums(self, request: LossRequest) -> PassResult:
        units, unit_of_B = units_of(request)
        losses: list[DatumLoss] = []
        logprobs: list[npt.NDArray[np.float32]] = []
        errors: list[tuple[Any, Any]] = []
        for i, (tokens, inputs) in enumerate(zip(request.tokens, request.inputs, strict=True)):
            drop = self._dropout(request, (len(tokens), 1), i)
            logits = self._base_VV[tokens] + drop * self._weights_VV[tokens]
            all_NV, targets = logits - _log_sum_exp(logits), inputs["target_tokens"]
            targets_NK = targets.reshape(len(tokens), -1)
            own = np.take_along_axis(all_NV, targets_NK, axis=1).reshape(targets.shape)
            logprobs.append(own.astype(np.float32))
            losses.append(loss := self._loss_of(request, own, inputs))
            if loss.slope is not None:
                errors.append(
                    (tokens, drop * _through_softmax(loss.slope.reshape(targets_NK.shape), targets_NK, all_NV))
                )
        contribution = self._contribution(units, unit_of_B, errors, form="sum") if request.train else None
        loss_sum = total([loss.value for loss in losses])
        if not self._config.private:
            ensure_finite_pass(loss_sum, contribution.sum_P if contribution else None)
        return PassResult(
            loss=loss_sum,
            loss_sum=loss_sum,
            num_targets=sum(lp.size for lp in logprobs),
            num_tokens=sum(len(tokens) for tokens in request.tokens),
            num_records=len(unit_of_B),
            contribution=contribution,
            logprobs=tuple(logprobs),
            metrics=joined_metrics(losses),
        )

    def _loss_of(self, request: LossRequest, logprobs: Floats, inputs: Mapping[str, Array]) -> DatumLoss:
        if request.loss.name != CUSTOM:
            return closed_form.evaluate(request.loss, logprobs, inputs, train=request.train)
        from tg_tinker_server.engine.loss_fns.graph import compiled  # torch: not where only NumPy is wanted

        return compiled(request.graph).evaluate(logprobs, inputs, train=request.train)

    def export_state(self, *, optimizer: bool) -> EngineState:
        """See ``backend.Session``."""
        self.ensure_open()
        tensors = {WEIGHTS + _TABLE: self._weights_VV.copy()}
        if optimizer:
            tensors |= {f"{OPTIMIZER}{_TABLE}/{k}": v.copy() for k, v in self._optimizer_state.items()}
            tensors |= self._anchor_tensors()
        name = self._config.optimizer.name if optimizer else None
        return EngineState(tensors=tensors, scalars={"model": MODEL_NAME, "optimizer": name})

    def import_state(self, state: EngineState, *, optimizer: bool) -> None:
        """See ``backend.Session``."""
        self.ensure_open()
        weights = checked_weights(state, self._layout)
        name = self._config.optimizer.name
        saved = checked_optimizer(state, self._layout, optimizer=name) if optimizer else {}
        self._anchor_P = self._anchor_of(state) if optimizer else None
        self._weights_VV = weights[_TABLE].copy()
        self._live.put(self._weights_VV)
        self._optimizer_state = {k: v.copy() for k, v in saved.get(_TABLE, {}).items()}
        self.discard_pending()

    def close(self) -> None:
        """See ``backend.Session``."""
        self._closed = True
        self.discard_pending()
        self._live.close()

    def _dropout(self, request: Request, shape: tuple[int, ...], *place: int) -> Floats:
        """Factor of the trained row at each position: all ones outside training."""
        rate = self._config.lora_config.dropout if self._config.lora_config else 0.0
        if not request.train or rate == 0:
            return np.ones(shape)
        seed = derived_seed(self._config.seed or 0, request.seed, self._dropout_key, *place)
        return (np.random.default_rng(seed).random(shape) >= rate) / (1.0 - rate)

    def _contribution(
        self, units: tuple[str, ...], unit_of_B: Ints, errors: list[tuple[Any, Any]], *, form: Form = "mean"
    ) -> GradientContribution:
        dp = self._config.dp_config if self._config.private else None
        sum_P, records = np.zeros(_V * _V), len(unit_of_B)
        if dp is None:
            _add_gradient(sum_P, errors)
            return GradientContribution(
                layout=self._layout, num_records=records, sum_P=sum_P, private=False, form=form
            )
        norms, kept = [np.zeros(0)], [np.zeros((0, _V * _V), dtype=np.float32)]
        for start in range(0, len(units), _UNITS_AT_ONCE):
            chunk = range(start, min(start + _UNITS_AT_ONCE, len(units)))
            grads_UP = np.zeros((len(chunk), _V * _V))
            for row, unit in enumerate(chunk):
                _add_gradient(grads_UP[row], [errors[i] for i in np.flatnonzero(unit_of_B == unit)])
            clipped = clip_and_sum(grads_UP, max_grad_norm=dp.max_grad_norm)
            sum_P += clipped.sum_P
            norms.append(clipped.norms_U)
            if dp.merge_units:
                kept.append(grads_UP.astype(np.float32))
        return GradientContribution(
            layout=self._layout,
            units=units,
            num_records=records,
            sum_P=sum_P,
            norms_U=np.concatenate(norms),
            grads_UP=np.concatenate(kept) if dp.merge_units else None,
            private=True,
            form=form,
        )

    def _apply(self, grad_P: npt.NDArray[np.float32], learning_rate: float, optimizer: OptimizerConfig) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            weights, state = numpy_optimizers.update(
                optimizer,
                self._weights_VV,
                grad_P.reshape(_V, _V),
                self._optimizer_state,
                learning_rate=learning_rate,
            )
        ensure_finite([weights])
        self._weights_VV, self._optimizer_state = weights, state
        self._live.put(weights)

    def _weights_P(self) -> npt.NDArray[np.float32]:  # noqa: N802 - shape suffix
        return self._weights_VV.reshape(-1)

    def live_weights(self) -> BigramWeights:
        """See ``backend.Session``."""
        self.ensure_open()
        return self._live


def _require_model(config: TrainingConfig) -> None:
    if config.model_ref != MODEL_NAME:
        raise InvalidRequestError(
            f"model {config.model_ref!r} is not offered here; offered: {MODEL_NAME}",
            field="model_ref",
            constraint=f"one of: {MODEL_NAME}",
        )


def _log_sum_exp(logits: Floats) -> Floats:
    top = logits.max(axis=-1, keepdims=True)
    return np.asarray(top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))


def _through_softmax(slope_NK: Floats, targets_NK: Ints, logprobs_NV: Floats) -> Floats:
    """What a change with log-probabilities of targets is with the logits [N, V]."""
    with np.errstate(invalid="ignore", over="ignore"):  # a slope that is not finite stays so
        error_NV: Floats = -np.exp(logprobs_NV) * slope_NK.sum(axis=1, keepdims=True)
        np.add.at(error_NV, (np.arange(len(targets_NK))[:, None], targets_NK), slope_NK)
    return error_NV


def _add_gradient(flat_P: Floats, errors: Sequence[tuple[Any, Any]]) -> None:
    """Add the gradient of some records to a flat table: each error row belongs to its token's row."""
    table_VV = flat_P.reshape(_V, _V)
    for tokens, rows in errors:
        np.add.at(table_VV, tokens, rows)
