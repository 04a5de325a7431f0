"""One run on a transformers model: passes, steps and state of one adapter (or of a private copy of the base).

Shape suffixes: B records, T tokens, V vocabulary, P parameters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import OptimizerConfig, TrainingConfig
from tg_tinker_server.engine import optimizers
from tg_tinker_server.engine.backend import EngineState, Request
from tg_tinker_server.engine.dp_optimizer import UnitClippingOptimizer
from tg_tinker_server.engine.grad_rows import GradRows
from tg_tinker_server.engine.gradients import ParamLayout
from tg_tinker_server.engine.lora import AdaptedBase, fused_parameters, own_parameters, trainable_parameters
from tg_tinker_server.engine.memory import bytes_per_token, parameters_of_products, tokens_within
from tg_tinker_server.engine.microbatch import Limits
from tg_tinker_server.engine.per_sample import PerSampleGradients, check_complete, columns_of
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.probe import probe
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights
from tg_tinker_server.engine.session_core import SessionCore, diverged, ensure_finite
from tg_tinker_server.engine.state import OPTIMIZER, WEIGHTS, checked_optimizer, checked_weights
from tg_tinker_server.engine.torch_pass import TorchPass

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
        self.base, self.adapter, self._performance, self._on_close = base, adapter, performance, on_close
        self.parameters = trainable_parameters(base.module, adapter)
        self._own = own_parameters(base.module, adapter)
        loaded = base.loaded
        self.layout = ParamLayout({name: tuple(p.shape) for name, p in self.parameters.items()})
        self._state_layout = ParamLayout({name: tuple(p.shape) for name, p in self._own.items()})
        super().__init__(
            config=config,
            layout=self.layout,
            tokenizer=loaded.tokenizer,
            vocab_size=loaded.vocab_size,
            model_positions=loaded.max_positions,
            base_dtype=str(loaded.dtype).removeprefix("torch."),
        )
        if config.gradient_checkpointing and not getattr(base.module, "supports_gradient_checkpointing", False):
            raise InvalidRequestError(
                f"{loaded.name} cannot compute its activations again; leave gradient_checkpointing out, and take a "
                "smaller micro_batch_size if memory is short",
                field="gradient_checkpointing",
                constraint="false for this model",
            )
        self.private = config.private
        self.keeps_units = config.private and config.dp_config is not None and config.dp_config.merge_units
        self.scale = float(config.loss_scale) if _needs_scale(config, loaded.dtype) else 1.0
        # Under privacy the masks of a record must not be computable by others: one more secret part of the seed.
        self.seeds = (config.seed or 0, os.urandom(16).hex() if config.private else "")
        self.lm = base.language_model
        self.random = self.lm.shortcuts.random or (config.lora_config is not None and config.lora_config.dropout > 0)
        fused = fused_parameters(base.module, adapter)
        self._alone = False
        self._live = TorchWeights(base, adapter, size_bytes=0, on_close=lambda: None)
        # What decides whether gradients per record are right, and how much a token keeps: not the weights.
        self._kind = (tuple(self.layout.shapes.items()), fused, self.random, self.checkpoints)
        self._all_fused = len(fused) == len(self.parameters)
        self._columns = columns_of(self.parameters, fused)
        self._tokens = self._most_tokens(performance)
        self._torch_optimizer = optimizers.make_optimizer(config.optimizer, list(self.parameters.values()))
        self._optimizer: torch.optim.Optimizer = self._torch_optimizer
        self._per_sample: PerSampleGradients | None = None
        self.clipper: UnitClippingOptimizer | None = None
        if config.private and config.dp_config is not None:
            self._per_sample = PerSampleGradients(
                base.module, self.parameters, self._columns, fused=fused, scratch=base.scratch
            )
            if self._kind not in base.tried:
                try:
                    probe(base, adapter, self._own, self._per_sample, self.lm, vocab_size=self.vocab_size)
                except BaseException:
                    self._per_sample.close()
                    raise
                base.tried.add(self._kind)
            self.clipper = UnitClippingOptimizer(
                self._torch_optimizer,
                columns=self._columns,
                max_grad_norm=config.dp_config.max_grad_norm,
                expected_batch_size=config.expected_batch_size,
                keep_units=config.dp_config.merge_units,
            )
            self._optimizer = self.clipper

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(iter(self.parameters.values())).device

    @property
    def checkpoints(self) -> bool:
        """Whether activations are computed again in the backward pass instead of kept."""
        return self._config.gradient_checkpointing

    @property
    def share_key(self) -> Hashable | None:
        """Sessions with equal keys can go through the model together; ``None`` goes alone.

        They have the same base in memory, adapters of the same shapes on the same layers, trained in the same
        factors, and nothing that makes a row depend on how it is batched.
        """
        lonely = self._alone or self.random or self.lm.shortcuts.by_length
        if lonely or self.adapter is None or not self._all_fused or not self.base.shareable:
            return None
        return (
            id(self.base),
            self.checkpoints,
            tuple(self.layout.shapes.items()),
            tuple(self._state_layout.shapes.items()),
        )

    def _most_tokens(self, performance: PerformanceConfig) -> int:
        if performance.micro_batch_tokens != "auto":
            return performance.micro_batch_tokens
        if self._kind not in self.base.bytes_per_token:
            self.base.bytes_per_token[self._kind] = bytes_per_token(
                self.base, self.adapter, self.lm, checkpoints=self.checkpoints
            )
        return tokens_within(
            performance.activation_bytes,
            self.base.bytes_per_token[self._kind],
            parameters=parameters_of_products(self.base.module),
            device=self.device.type,
        )

    def limits(self, *, train: bool) -> Limits:
        """What one run through the model may hold for this session."""
        tokens, records = self._tokens, sys.maxsize
        if isinstance(self._config.micro_batch_size, int):
            records = self._config.micro_batch_size
        if train and (self.private or self.share_key is not None):
            records = min(records, max(1, self._performance.per_sample_bytes // (4 * self._columns.width)))
        return Limits(tokens=tokens, records=records)

    def start(self, request: Request) -> TorchPass:
        """See ``backend.Session``."""
        self.ensure_open()
        self.check(request)
        return TorchPass(self, request)

    @contextmanager
    def recording(self, records: int, *, joined: bool = False) -> Iterator[GradRows]:
        """A matrix for the per-sample gradients of the backward pass inside.

        Args:
            records: rows of the pass.
            joined: some of them are other sessions'.

        Raises:
            DPUnsupportedError: some gradient is not one per record.
        """
        if self._per_sample is not None and not joined:
            with self._per_sample.recording(records) as grads:
                yield grads
            return
        grads = GradRows(self._columns, records, self.device, self.base.scratch)
        yield grads
        check_complete(grads)

    def go_alone(self) -> None:
        """Share no slice from now on: rows of others were tried and do not work with this model."""
        self._alone = True

    def forget_gradients(self) -> None:
        """Drop gradients of a slice that is over, or that failed half-way."""
        if self._per_sample is not None:
            self._per_sample.reset()

    def export_state(self, *, optimizer: bool) -> EngineState:
        """See ``backend.Session``."""
        self.ensure_open()
        tensors = {WEIGHTS + n: p.detach().float().cpu().numpy().copy() for n, p in self._own.items()}
        if optimizer:
            for name, values in optimizers.state_of(self._torch_optimizer, self.parameters).items():
                for quantity, value in values.items():
                    tensors[f"{OPTIMIZER}{name}/{quantity}"] = value.float().cpu().numpy()
            tensors |= self._anchor_tensors()
        return EngineState(
            tensors=tensors,
            scalars={
                "model": self.base.loaded.name,
                "optimizer": self._config.optimizer.name if optimizer else None,
            },
        )

    def import_state(self, state: EngineState, *, optimizer: bool) -> None:
        """See ``backend.Session``."""
        self.ensure_open()
        weights = checked_weights(state, self._state_layout)
        saved = checked_optimizer(state, self._layout, optimizer=self._config.optimizer.name) if optimizer else {}
        self._anchor_P = self._anchor_of(state) if optimizer else None
        with torch.no_grad():
            for name, parameter in self._own.items():
                parameter.copy_(torch.from_numpy(weights[name]))
        self._live.changed()
        optimizers.restore_state(
            self._torch_optimizer,
            self.parameters,
            {
                name: {
                    # The step count stays on the processor, as torch keeps it.
                    quantity: torch.tensor(value, device=self.device if value.ndim else "cpu")
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
        if self._per_sample is not None:
            self._per_sample.close()
        self._closed = True
        self.discard_pending()
        self._torch_optimizer.state.clear()
        self._live.close()
        self._on_close()

    def _weights_P(self) -> npt.NDArray[np.float32]:  # noqa: N802 - shape suffix
        return np.concatenate([p.detach().float().cpu().numpy().reshape(-1) for p in self.parameters.values()])

    def live_weights(self) -> TorchWeights:
        """See ``backend.Session``."""
        self.ensure_open()
        return self._live

    def _apply(self, grad_P: npt.NDArray[np.float32], learning_rate: float, optimizer: OptimizerConfig) -> None:
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        state = optimizers.state_of(self._torch_optimizer, self.parameters)
        try:
            for name, grad in self._layout.split(grad_P).items():
                self.parameters[name].grad = torch.from_numpy(grad).to(self.device)
            optimizers.configure(self._torch_optimizer, optimizer, learning_rate=learning_rate)
            self._optimizer.step()
            ensure_finite([p.detach().cpu().numpy() for p in self.parameters.values()])
        except BaseException as e:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(before[name])
            optimizers.restore_state(self._torch_optimizer, self.parameters, state)
            if isinstance(e, RuntimeError) and "without overflow" in str(e):
                raise diverged("the step leaves the range of float32") from e
            raise
        finally:
            self._live.changed()
            for parameter in self.parameters.values():
                parameter.grad = None


def _needs_scale(config: TrainingConfig, dtype: torch.dtype) -> bool:
    """Static scales matter for half precision; "dynamic" is nothing there, as bfloat16 has float32's range."""
    return dtype in _HALF and config.loss_scale != "dynamic"
