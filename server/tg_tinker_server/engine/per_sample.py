"""Per-sample gradients of one run's own parameters, behind Opacus's interface for ways to compute them.

Adapters have the fused rule (fused_lora.py), every other trained module one of Opacus's samplers (taps.py), and a
parameter that neither reaches makes the run impossible. Only this run's modules are touched, so that many runs can
share one base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from torch import nn

from tg_tinker.errors import DPUnsupportedError
from tg_tinker_server.engine.grad_rows import Columns, GradRows, Scratch
from tg_tinker_server.engine.taps import ModuleTap


class PerSampleGradients(AbstractGradSampleHooks):  # type: ignore[misc]
    """Computes each trained parameter's gradient per record.

    Args:
        root: the model.
        parameters: the run's trained parameters by name, sorted.
        columns: where each lies in the matrix.
        fused: names of those with the fused rule.
        scratch: memory for the matrix.

    Raises:
        DPUnsupportedError: a trained module keeps buffers, which no per-sample rule covers.
    """

    def __init__(
        self,
        root: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        columns: Columns,
        *,
        fused: frozenset[str] = frozenset(),
        scratch: Scratch | None = None,
    ) -> None:
        ruleless = [name for name in parameters if ".lora_" in name and name not in fused]
        if ruleless:  # adapters on embeddings, DoRA and other variants
            raise _no_rule(ruleless, "have no per-sample gradient")
        self._parameters = dict(parameters)
        self._columns = columns
        self._scratch = scratch
        own = nn.ModuleList(_owning_modules(root, self._parameters))
        super().__init__(own, batch_first=True, loss_reduction="sum")
        self._now: GradRows | None = None
        others = {id(p) for name, p in self._parameters.items() if name not in fused}
        self._taps: list[ModuleTap] = []
        try:
            for module in own:
                if any(id(p) in others for p in module.parameters(recurse=False)):
                    _refuse_buffers(module)
                    self._taps.append(ModuleTap(module, lambda: self._now))
        except BaseException:
            self.cleanup()
            raise

    @contextmanager
    def recording(self, records: int) -> Iterator[GradRows]:
        """Within it, backward passes leave their per-sample gradients in the result.

        At its end each parameter has its own as Opacus's ``grad_sample``, until ``reset``.

        Raises:
            DPUnsupportedError: a parameter has none, or its leading dimension is not the records: clipping it would
                clip something else than a record, and epsilon would be untrue.
        """
        device = next(iter(self._parameters.values())).device
        self._now = grads = GradRows(self._columns, records, device, self._scratch)
        try:
            yield grads
        finally:
            self._now = None
        check_complete(grads)
        for parameter in self._parameters.values():
            parameter.grad_sample = self._columns.by_parameter[id(parameter)].of(grads.matrix_NW)  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Drop gradients, also those of a pass that failed half-way."""
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def remove_hooks(self) -> None:
        """Take the taps off; part of Opacus's ``cleanup``, which also clears its attributes."""
        for tap in self._taps:
            tap.remove()
        self._taps = []

    def close(self) -> None:
        """Leave no trace on modules and parameters."""
        self.cleanup()
        for parameter in self._parameters.values():
            parameter.grad = None


def columns_of(parameters: Mapping[str, nn.Parameter], fused: frozenset[str]) -> Columns:
    """The columns of a run's parameters. The fused rule makes the second matrix of an adapter (B) transposed."""
    return Columns(parameters, frozenset(name for name in fused if ".lora_B." in name))


def check_complete(grads: GradRows) -> None:
    """Raise DPUnsupportedError unless every parameter has one gradient per record."""
    if grads.misshapen:
        raise _no_rule(sorted(grads.misshapen), "give per-sample gradients that are not one per record")
    missing = grads.missing()
    if missing:
        raise _no_rule(missing, "have no per-sample gradient")


def _owning_modules(root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[nn.Module]:
    """Modules under ``root`` that hold one of the parameters directly."""
    wanted = {id(p) for p in parameters.values()}
    return [m for m in root.modules() if any(id(p) in wanted for p in m.parameters(recurse=False))]


def _refuse_buffers(module: nn.Module) -> None:
    if next(iter(module.buffers()), None) is not None:
        raise DPUnsupportedError(
            f"a trained {type(module).__name__} keeps statistics over samples, which has no per-sample gradient",
            feature="model",
            reason="trained modules with buffers mix samples",
            alternative="GroupNorm in place of BatchNorm; train an adapter instead of the base",
        )


def _no_rule(names: list[str], problem: str) -> DPUnsupportedError:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return DPUnsupportedError(
        f"under differential privacy these parameters cannot be trained, because they {problem}: {shown}; "
        "choose other target_modules (the attention projections work)",
        feature="lora_config.target_modules",
        reason="every trained parameter needs one gradient per record",
        alternative="target_modules=['q_proj', 'v_proj']",
        details={"parameters": names},
    )
