"""Per-sample gradients of one run's own modules, by Opacus hooks.

Only the modules that hold the run's trainable parameters carry hooks, so many runs can share one base model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from tg_tinker.errors import DPUnsupportedError

# Hooks see the gradients of a module's outputs, which is all that is needed of a first layer's frozen input.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


def owning_modules(root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[nn.Module]:
    """Modules under ``root`` that hold one of the parameters directly."""
    wanted = {id(p) for p in parameters.values()}
    return [m for m in root.modules() if any(id(p) in wanted for p in m.parameters(recurse=False))]


class PerSampleGradients:
    """Hooks on the modules of one run; ``take`` returns each parameter's gradient per record.

    Args:
        root: the model.
        parameters: the run's trainable parameters by name; they must require gradients now.

    Raises:
        DPUnsupportedError: a trainable module keeps buffers, which no per-sample rule covers.
    """

    def __init__(self, root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._modules = nn.ModuleList(owning_modules(root, parameters))
        try:
            self._hooks = GradSampleHooks(self._modules, batch_first=True, loss_reduction="sum", strict=True)
        except NotImplementedError as e:
            raise DPUnsupportedError(
                f"a trainable module keeps statistics over samples, which has no per-sample gradient: {e}",
                feature="model",
                reason="trainable modules with buffers mix samples",
                alternative="GroupNorm in place of BatchNorm; train an adapter instead of the base",
            ) from e
        self.reset()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that carry hooks."""
        return list(self._modules)

    def take(self, records: int) -> dict[str, torch.Tensor]:
        """Per-sample gradients [records, ...] of the backward pass just done, and forget them.

        Raises:
            DPUnsupportedError: a parameter has none, or its leading dimension is not the records: clipping it would
                clip something else than a record, and epsilon would be untrue.
        """
        grads: dict[str, torch.Tensor] = {}
        missing, misshapen = [], []
        for name, parameter in self._parameters.items():
            grad = getattr(parameter, "grad_sample", None)
            if not isinstance(grad, torch.Tensor):
                missing.append(name)
            elif grad.shape != (records, *parameter.shape):
                misshapen.append(name)
            else:
                grads[name] = grad
        self.reset()
        if missing:
            raise _no_rule(missing, "have no per-sample gradient")
        if misshapen:
            raise _no_rule(misshapen, "give per-sample gradients that are not one per record")
        return grads

    def reset(self) -> None:
        """Drop gradients and activations, also those of a pass that failed half-way."""
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            if hasattr(parameter, "_current_grad_sample"):
                del parameter._current_grad_sample
        for module in self._modules:
            for leftover in ("activations", "max_batch_len"):
                if hasattr(module, leftover):
                    delattr(module, leftover)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, passes through the model are ordinary ones."""
        self._hooks.disable_hooks()
        try:
            yield
        finally:
            self._hooks.enable_hooks()

    def close(self) -> None:
        """Take the hooks off and leave no trace on modules and parameters."""
        self.reset()
        self._hooks.cleanup()
        for parameter in self._parameters.values():
            for attribute in ("grad_sample", "_forward_counter", "summed_grad"):
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)


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
