"""One run on a transformers model: passes, steps and state of one adapter (or of a private copy of the base).

Shape suffixes: B records, T tokens, V vocabulary, P parameters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker.types import TrainingConfig
from tg_tinker_server.engine import optimizers
from tg_tinker_server.engine.backend import EngineState, PassRequest, PassResult
from tg_tinker_server.engine.dp_optimizer import UnitClippingOptimizer
from tg_tinker_server.engine.gradients import Floats, GradientContribution, ParamLayout
from tg_tinker_server.engine.lora import AdaptedBase, trainable_parameters
from tg_tinker_server.engine.losses import RecordLosses, record_losses
from tg_tinker_server.engine.microbatch import plan, used_lengths
from tg_tinker_server.engine.passes import WholePass
from tg_tinker_server.engine.per_sample import PerSampleGradients
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.probe import probe
from tg_tinker_server.engine.requests import units_of
from tg_tinker_server.engine.session_core import (
    SessionCore,
    derived_seed,
    diverged,
    ensure_finite,
    ensure_finite_pass,
)
from tg_tinker_server.engine.state import OPTIMIZER, WEIGHTS, checked_optimizer, checked_weights
from tg_tinker_server.engine.torch_decoder import TorchDecoder

_HALF = (torch.bfloat16, torch.float16)


class TorchSession(SessionCore):
    """See ``backend.Session``.

    Args:
        base: the model, with this run's adapter on it.
        adapter: its name; ``None`` trains the whole base, which is then this run's alone.
        config: of the run.
        performance: bounds of memory; changes no result beyond rounding.
        on_close: called once.
    """

    def __init__(
        self,
        base: AdaptedBase,
        adapter: str | None,
        config: TrainingConfig,
        performance: PerformanceConfig,
        on_close: Callable[[], None],
    ) -> None:
        self._base, self._adapter, self._performance, self._on_close = base, adapter, performance, on_close
        base.activate(adapter)
        self._parameters = trainable_parameters(base.module, adapter)
        loaded = base.loaded
        super().__init__(
            config=config,
            layout=ParamLayout({name: tuple(p.shape) for name, p in self._parameters.items()}),
            tokenizer=loaded.tokenizer,
            vocab_size=loaded.vocab_size,
            model_positions=loaded.max_positions,
            base_dtype=str(loaded.dtype).removeprefix("torch."),
            group_size=performance.generation_rows,
        )
        self._scale = float(config.loss_scale) if _needs_scale(config, loaded.dtype) else 1.0
        # Under privacy the masks of a record must not be computable by others: one more secret part of the seed.
        self._dropout_key = os.urandom(16).hex() if config.private else ""
        self._torch_optimizer = optimizers.make_optimizer(config.optimizer, list(self._parameters.values()))
        self._optimizer: torch.optim.Optimizer = self._torch_optimizer
        self._per_sample: PerSampleGradients | None = None
        if config.private and config.dp_config is not None:
            self._per_sample = PerSampleGradients(base.module, self._parameters)
            try:
                probe(base.module, self._parameters, self._per_sample, self._logits, vocab_size=self.vocab_size)
            except BaseException:
                self._per_sample.close()
                raise
            self._clipper = UnitClippingOptimizer(
                self._torch_optimizer,
                layout=self._layout,
                max_grad_norm=config.dp_config.max_grad_norm,
                expected_batch_size=config.expected_batch_size,
                keep_units=config.dp_config.merge_units,
            )
            self._optimizer = self._clipper

    def start(self, request: PassRequest) -> WholePass:
        """See ``backend.Session``."""
        self._ensure_open()
        self.check(request)
        return WholePass(lambda: self._compute(request))

    def _compute(self, request: PassRequest) -> PassResult:
        self._ensure_open()
        units, unit_of_B = units_of(request)
        records = len(unit_of_B)
        means_B, sums_B, targets_B = (np.zeros(records) for _ in range(3))
        sum_P = torch.zeros(self._layout.size, dtype=torch.float32, device=self._device)
        with self._training(request) if request.train else self._inference():
            for index in self._micro_batches(request, unit_of_B):
                losses = self._losses(request, index)
                if request.train and self._per_sample is not None:
                    self._fold_private(losses, unit_of_B[index])
                elif request.train:
                    sum_P += self._gradient(losses)
                means_B[index] = losses.mean_B.detach().cpu().numpy()
                sums_B[index] = losses.sum_B.detach().cpu().numpy()
                targets_B[index] = losses.targets_B.cpu().numpy()
            contribution = self._contribution(units, records, sum_P) if request.train else None
        loss = math.fsum(means_B) / max(1, records)
        if not self._config.private:
            ensure_finite_pass(loss, contribution.sum_P if contribution else None)
        return PassResult(
            loss=loss,
            loss_sum=math.fsum(sums_B),
            num_targets=int(targets_B.sum()),
            num_tokens=int(request.attention_mask_BT.sum()),
            num_records=records,
            contribution=contribution,
        )

    def export_state(self, *, optimizer: bool) -> EngineState:
        """See ``backend.Session``."""
        self._ensure_open()
        tensors = {WEIGHTS + n: p.detach().float().cpu().numpy().copy() for n, p in self._parameters.items()}
        if optimizer:
            for name, values in optimizers.state_of(self._torch_optimizer, self._parameters).items():
                for quantity, value in values.items():
                    tensors[f"{OPTIMIZER}{name}/{quantity}"] = value.float().cpu().numpy()
        return EngineState(
            tensors=tensors,
            scalars={
                "model": self._base.loaded.name,
                "optimizer": self._config.optimizer.name if optimizer else None,
            },
        )

    def import_state(self, state: EngineState, *, optimizer: bool) -> None:
        """See ``backend.Session``."""
        self._ensure_open()
        weights = checked_weights(state, self._layout)
        saved = checked_optimizer(state, self._layout, optimizer=self._config.optimizer.name) if optimizer else {}
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(weights[name]))
        optimizers.restore_state(
            self._torch_optimizer,
            self._parameters,
            {
                name: {
                    # The step count stays on the processor, as torch keeps it.
                    quantity: torch.tensor(value, device=self._device if value.ndim else "cpu")
                    for quantity, value in values.items()
                }
                for name, values in saved.items()
            },
        )
        self.discard_pending()

    def close(self) -> None:
        """See ``backend.Session``."""
        if self._closed:
            return
        self._base.activate(self._adapter)  # Opacus cleans what requires gradients now
        if self._per_sample is not None:
            self._per_sample.close()
        self._closed = True
        self.discard_pending()
        self._torch_optimizer.state.clear()
        self._on_close()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _decoder(self) -> TorchDecoder:
        return TorchDecoder(self._base.module, self._inference)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """The adapter active, dropout off, nothing recorded."""
        self._ensure_open()
        self._base.activate(self._adapter)
        self._base.module.eval()
        with torch.no_grad():
            yield

    @contextmanager
    def _training(self, request: PassRequest) -> Iterator[None]:
        """The adapter active, dropout on under its own seed; whatever happens, no trace is left."""
        self._base.activate(self._adapter)
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(self._config.seed or 0, request.seed, self._dropout_key))
            self._base.module.train()
            try:
                with torch.enable_grad():
                    yield
            finally:
                self._base.module.eval()
                if self._per_sample is not None:
                    self._per_sample.reset()
                    self._clipper.reset()

    def _micro_batches(self, request: PassRequest, unit_of_B: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        limits = self._performance
        tokens, records = limits.micro_batch_tokens, len(unit_of_B)
        if self._config.gradient_checkpointing:
            tokens = max(1, tokens // 4)  # less memory for more time, with the same result
        if self._per_sample is not None and request.train:
            records = max(1, limits.per_sample_bytes // (4 * max(1, self._layout.size)))
        # Only the clip needs the records of a unit together.
        units = unit_of_B if self._per_sample is not None else np.arange(len(unit_of_B))
        return plan(used_lengths(request), units, max_tokens=tokens, max_records=max(1, records))

    def _losses(self, request: PassRequest, index: npt.NDArray[np.int64]) -> RecordLosses:
        width = int(used_lengths(request)[index].max())
        ids_BT, mask_BT, labels_BT = (
            torch.from_numpy(np.ascontiguousarray(a[index, :width])).to(self._device)
            for a in (request.input_ids_BT, request.attention_mask_BT, request.labels_BT)
        )
        return record_losses(self._logits(ids_BT, mask_BT), labels_BT)

    def _logits(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        out = self._base.module(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        logits: torch.Tensor = out.logits
        return logits

    def _gradient(self, losses: RecordLosses) -> torch.Tensor:
        """Gradient [P] of the sum over records."""
        parameters = list(self._parameters.values())
        total = losses.mean_B.sum() * self._scale
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        return torch.cat([g.reshape(-1).float() for g in parts]) / self._scale

    def _fold_private(self, losses: RecordLosses, unit_of_B: npt.NDArray[np.int64]) -> None:
        """Per-sample gradients of one micro-batch, clipped and added at once."""
        assert self._per_sample is not None
        (losses.mean_B.sum() * self._scale).backward()  # type: ignore[no-untyped-call]
        grads = self._per_sample.take(len(unit_of_B))
        self._clipper.clip_and_accumulate(grads, unit_of_B, scale=self._scale)

    def _contribution(self, units: tuple[str, ...], records: int, sum_P: torch.Tensor) -> GradientContribution:
        if self._per_sample is not None:
            return self._clipper.take(units)
        flat_P: Floats = sum_P.cpu().numpy().astype(np.float64)
        return GradientContribution(layout=self._layout, num_records=records, sum_P=flat_P, private=False)

    def _apply(self, grad_P: npt.NDArray[np.float32], learning_rate: float) -> None:
        self._base.activate(self._adapter)
        before = {name: p.detach().clone() for name, p in self._parameters.items()}
        state = optimizers.state_of(self._torch_optimizer, self._parameters)
        try:
            for name, grad in self._layout.split(grad_P).items():
                self._parameters[name].grad = torch.from_numpy(grad).to(self._device)
            for group in self._torch_optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            ensure_finite([p.detach().cpu().numpy() for p in self._parameters.values()])
        except BaseException as e:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(before[name])
            optimizers.restore_state(self._torch_optimizer, self._parameters, state)
            if isinstance(e, RuntimeError) and "without overflow" in str(e):
                raise diverged("the step leaves the range of float32") from e
            raise
        finally:
            for parameter in self._parameters.values():
                parameter.grad = None


def _needs_scale(config: TrainingConfig, dtype: torch.dtype) -> bool:
    """Static scales matter for half precision; "dynamic" is nothing there, as bfloat16 has float32's range."""
    return dtype in _HALF and config.loss_scale != "dynamic"
