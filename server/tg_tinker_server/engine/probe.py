"""Tries a model before a private run starts: does any record see another, is every gradient one record's own?

Types alone do not tell: Opacus's validator misses subclasses of BatchNorm and frozen ones, and a model that
flattens batch and time gives per-token gradients under the name of per-sample ones.

Shape suffixes: B records, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tg_tinker.errors import DPUnsupportedError
from tg_tinker_server.engine.forward import CausalLM, position_codings
from tg_tinker_server.engine.lora import AdaptedBase
from tg_tinker_server.engine.losses import record_losses
from tg_tinker_server.engine.per_sample import PerSampleGradients

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MANY, _LONG = 9, 48
_RECORDS, _TOKENS = 3, 5  # different numbers, so that a dimension of one is never taken for the other


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise unless the model is free of BatchNorm, its subclasses and its frozen forms included."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in type(module).__name__:
            raise DPUnsupportedError(
                f"the model holds {type(module).__name__} at {name!r}, whose output for one record depends on the "
                "others; frozen or not, it is refused under differential privacy. Use GroupNorm instead",
                feature="model",
                reason="BatchNorm mixes the records of a batch",
                alternative="GroupNorm",
            )


def refuse_what_couples_by_design(model: nn.Module) -> None:
    """Raise where records meet in a way that a trial of few tokens does not show."""
    if "dynamic" in position_codings(model):
        raise DPUnsupportedError(
            "the model's rotary positions are of type 'dynamic': the longest record of a batch changes them for all "
            "others, and for later batches. Use a model with rope_type 'default', 'linear', 'yarn' or 'llama3'",
            feature="model",
            reason="positions depend on other records",
            alternative="a fixed rope_type",
        )
    config = getattr(model, "config", None)
    experts = max((n for n in (getattr(config, name, 0) for name in _EXPERTS) if isinstance(n, int)), default=0)
    if experts > 1:
        raise DPUnsupportedError(
            f"the model routes tokens to the best of {experts} experts: who shares a micro-batch decides how a token "
            "is rounded, and a near tie then goes to another expert, which no noise is paid for. Use a dense model",
            feature="model",
            reason="routing is not continuous",
            alternative="a dense model",
        )


def probe(
    base: AdaptedBase,
    adapter: str | None,
    parameters: Mapping[str, nn.Parameter],
    gradients: PerSampleGradients,
    lm: CausalLM,
    *,
    vocab_size: int,
) -> None:
    """Raise DPUnsupportedError unless records are independent and per-sample gradients exact.

    Parameters are moved a little for the trial (a fresh adapter's second half is zero and would hide a wrong rule in
    the first, also where it is frozen) and put back; buffers and the global generator too.

    Args:
        base: the model.
        adapter: the run's, or ``None``.
        parameters: the run's own parameters, frozen ones included.
        gradients: how their per-sample gradients are computed.
        lm: how its losses are computed.
        vocab_size: ids to try.
    """
    model = base.module
    refuse_batch_norm(model)
    refuse_what_couples_by_design(model)
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            device = next(iter(parameters.values())).device
            ids_BT = torch.randint(vocab_size, (_RECORDS + 1, _TOKENS)).to(device)
            with torch.no_grad():
                for p in parameters.values():
                    p.add_(torch.randn(p.shape).to(p), alpha=0.02)
            half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
            tolerance = 2e-2 if half else 2e-5
            long = min(_LONG, base.loaded.max_positions)
            with base.computing(adapter), base.training():  # as in training; equal seeds give equal dropout
                _check_no_mixing(lm, ids_BT, tolerance=tolerance)
                _check_no_mixing(lm, torch.randint(vocab_size, (_MANY + 1, long)).to(device), tolerance=tolerance)
            _check_no_memory(model, buffers)
            trained = {name: p for name, p in parameters.items() if p.requires_grad}
            _check_gradients(base, adapter, trained, gradients, lm, ids_BT, tolerance=0.1 if half else 1e-3)
        finally:
            gradients.reset()
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(saved[name])
                for name, b in model.named_buffers():
                    b.copy_(buffers[name])
            model.eval()


def _check_no_mixing(lm: CausalLM, ids_BT: torch.Tensor, *, tolerance: float) -> None:
    """Put the last record in the place of the first; every other record's loss must stay."""

    def losses(ids: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return lm.losses(ids, None, ids).mean_B

    others = losses(ids_BT[:-1])[1:]
    changed = torch.cat([ids_BT[-1:], ids_BT[1:-1]])
    moved = (losses(changed)[1:] - others).abs()
    if not bool((moved <= tolerance * (1 + others.abs())).all()):
        raise DPUnsupportedError(
            "changing one record of a batch changed the losses of the others: some module of the model mixes "
            "records (batch statistics, shared routing). Clipping cannot bound that; use per-record "
            "normalisation such as GroupNorm",
            feature="model",
            reason="a record's loss depends on other records",
            alternative="GroupNorm",
        )


def _check_no_memory(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """A pass in training mode must leave every buffer as it was."""
    changed = [name for name, b in model.named_buffers() if not torch.equal(b, buffers[name])]
    if changed:
        raise DPUnsupportedError(
            f"a pass in training mode changes {changed[0]!r}: the model would keep what it saw of private records "
            "outside of any charge",
            feature="model",
            reason="a module keeps statistics",
            alternative="GroupNorm",
        )


def _check_gradients(
    base: AdaptedBase,
    adapter: str | None,
    parameters: Mapping[str, nn.Parameter],
    gradients: PerSampleGradients,
    lm: CausalLM,
    ids_BT: torch.Tensor,
    *,
    tolerance: float,
) -> None:
    """Compare every record's gradient with that of a batch of one, computed by PEFT and autograd, without dropout."""
    ids_BT = ids_BT[:_RECORDS]
    base.module.eval()
    with gradients.recording(_RECORDS) as rows, base.computing(adapter, grads=rows):
        total = lm.losses(ids_BT, None, ids_BT).mean_B.sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
    together = {name: rows.columns.by_parameter[id(p)].of(rows.matrix_NW) for name, p in parameters.items()}
    wrong: set[str] = set()
    for i in range(_RECORDS):
        with base.by_peft(adapter):
            loss = record_losses(lm.logits(ids_BT[i : i + 1]), ids_BT[i : i + 1]).mean_B.sum()
            alone = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        total = torch.stack([g.float().norm() for g in alone if g is not None]).norm()
        for name, g in zip(parameters, alone, strict=True):
            expected = torch.zeros_like(parameters[name]) if g is None else g
            error = (together[name][i].float() - expected.float()).norm()
            if not bool(error <= tolerance * (expected.float().norm() + 0.01 * total)):
                wrong.add(name)
    if wrong:
        names = sorted(wrong)
        raise DPUnsupportedError(
            f"the per-sample gradients of these parameters are wrong: {', '.join(names[:4])}"
            f"{' and more' if len(names) > 4 else ''}; under differential privacy they cannot be trained. Choose "
            "other target_modules (the attention projections work)",
            feature="lora_config.target_modules",
            reason="every trained parameter needs one exact gradient per record",
            alternative="target_modules=['q_proj', 'v_proj']",
            details={"parameters": names},
        )
