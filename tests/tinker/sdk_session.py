"""What a script may do with the Tinker SDK, once, against a server; a process of its own, so that any SDK can run it.

    PYTHONPATH=<folder of an older SDK> python sdk_session.py <base url> <key> <model>

Prints one line of JSON: the SDK's version and what was observed. Nothing of ours is imported.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

PROMPT, ANSWER = [5, 6, 7, 8], [9, 10, 11]
ADAM = types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8)
RL_LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")


def made(creation: Any) -> Any:
    """The client itself: newer SDKs return a future of it."""
    return creation.result() if hasattr(creation, "result") else creation


def tensor(values: Any, dtype: str) -> types.TensorData:
    """A dense tensor."""
    array = np.asarray(values)
    return types.TensorData(data=array.reshape(-1).tolist(), dtype=dtype, shape=list(array.shape))


def supervised(shift: int = 0) -> types.Datum:
    """A prompt without weight and an answer with."""
    tokens = [*PROMPT, *(t + shift for t in ANSWER)]
    weights = [0.0] * (len(PROMPT) - 1) + [1.0] * len(ANSWER)
    inputs = {"target_tokens": tensor(tokens[1:], "int64"), "weights": tensor(weights, "float32")}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def sampled(logprobs: list[float], advantage: float, *, mask: bool) -> types.Datum:
    """A sampled answer as RL scripts send it."""
    tokens, before = [*PROMPT, *ANSWER], [0.0] * (len(PROMPT) - 1)
    inputs = {
        "target_tokens": tensor(tokens[1:], "int64"),
        "logprobs": tensor(before + logprobs, "float32"),
        "advantages": tensor(before + [advantage] * len(ANSWER), "float32"),
    }
    if mask:
        inputs["sequence_ratio_mask"] = tensor(before + [1.0] * len(ANSWER), "float32")
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def squared(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that no table has: the mean over datums of half the squared log-probabilities."""
    return torch.stack([0.5 * (lp**2).sum() for lp in logprobs]).mean(), {"datums": float(len(data))}


def losses(client: Any) -> dict[str, float]:
    """Every loss once, and a step after each."""
    seen: dict[str, float] = {}
    data = [supervised(), supervised(20)]
    first = client.forward_backward(data, "cross_entropy").result()
    assert [output["logprobs"].shape for output in first.loss_fn_outputs] == [[6], [6]]
    by_hand = -sum(sum(output["logprobs"].data[3:]) for output in first.loss_fn_outputs)
    assert math.isclose(first.metrics["loss:sum"], by_hand, rel_tol=1e-4)
    seen["cross_entropy"] = first.metrics["loss:sum"]
    before = client.forward(data, "cross_entropy").result().metrics["loss:sum"]
    assert math.isclose(before, first.metrics["loss:sum"], rel_tol=1e-6)
    seen["grad_norm"] = client.optim_step(ADAM).result().metrics["unclipped_grad_norm"]
    after = client.forward(data, "cross_entropy").result()
    assert after.metrics["loss:sum"] < before
    logprobs = after.loss_fn_outputs[0]["logprobs"].data[3:]
    for name in RL_LOSSES:
        group = [sampled(logprobs, a, mask=name == "gspo") for a in (1.0, -0.5)]
        seen[name] = client.forward_backward(group, name).result().metrics["loss:sum"]
        client.optim_step(ADAM).result()
    custom = client.forward_backward_custom(data, squared).result()
    assert custom.metrics["datums"] == 2.0
    client.optim_step(ADAM).result()
    return seen


def weighted(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy once more, as a loss for each datum that a server may run itself."""
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss}


def loss_by_handle(service: Any, client: Any) -> bool:
    """A loss that was created first, in the SDKs that can."""
    if not hasattr(service, "create_custom_loss"):
        return False
    handle = service.create_custom_loss(weighted, {"logprobs": 1, "weights": 1}).result()
    data = [supervised(), supervised(20)]
    own = client.forward_backward_custom(data, handle).result().metrics["custom/nll:sum"]
    known = client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
    assert math.isclose(own, known, rel_tol=1e-5)
    client.optim_step(ADAM).result()
    return handle.loss_id is not None


def alternatives(client: Any) -> None:
    """Targets of several tokens for each position, as distillation sends them."""
    tokens = [*PROMPT, *ANSWER]
    targets = np.array([[t, t + 1] for t in tokens[1:]])
    weights = np.full(targets.shape, 0.5)
    inputs = {"target_tokens": tensor(targets, "int64"), "weights": tensor(weights, "float32")}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    result = client.forward([datum], "cross_entropy").result()
    assert result.loss_fn_outputs[0]["logprobs"].shape == [6, 2]


def checkpoints(service: Any, client: Any) -> dict[str, str]:
    """Save, step away, come back; go on in another client, with and without the optimizer."""

    def nll(of: Any) -> float:
        return float(of.forward([supervised()], "cross_entropy").result().metrics["loss:sum"])

    def step(of: Any) -> None:
        of.forward_backward([supervised()], "cross_entropy").result()
        of.optim_step(ADAM).result()

    saved = client.save_state("first").result().path
    at_save = nll(client)
    step(client)
    one_later = nll(client)
    assert one_later < at_save
    client.load_state_with_optimizer(saved).result()
    assert math.isclose(nll(client), at_save, rel_tol=1e-5)
    step(client)
    assert math.isclose(nll(client), one_later, rel_tol=1e-4), "the optimizer came back too"
    resumed = made(service.create_training_client_from_state_with_optimizer(saved))
    assert math.isclose(nll(resumed), at_save, rel_tol=1e-5)
    step(resumed)
    assert math.isclose(nll(resumed), one_later, rel_tol=1e-4)
    fresh = made(service.create_training_client_from_state(saved))
    assert math.isclose(nll(fresh), at_save, rel_tol=1e-5)
    client.load_state(saved).result()
    return {"saved": saved}


def sampling(service: Any, client: Any, model: str) -> dict[str, str]:
    """From the base model, from a saved sampler and from an ephemeral one; log-probabilities as in training."""
    prompt = types.ModelInput.from_ints(PROMPT)
    params = types.SamplingParams(max_tokens=4, seed=3, temperature=1.0, stop=[])
    base = made(service.create_sampling_client(base_model=model))
    out = base.sample(prompt, num_samples=2, sampling_params=params).result()
    again = base.sample(prompt, num_samples=2, sampling_params=params).result()
    assert [s.tokens for s in out.sequences] == [s.tokens for s in again.sequences]
    assert all(len(s.tokens) == len(s.logprobs) == 4 for s in out.sequences)
    whole = types.ModelInput.from_ints([*PROMPT, *ANSWER])
    trained = client.forward([supervised()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    path = client.save_weights_for_sampler("sampler").result().path
    named = made(service.create_sampling_client(model_path=path))
    ephemeral = made(client.save_weights_and_get_sampling_client())
    for sampler in (named, ephemeral):
        logprobs = sampler.compute_logprobs(whole).result()
        assert logprobs[0] is None
        assert np.allclose(logprobs[1:], trained, atol=1e-4)
    listed = ephemeral.sample(
        whole, num_samples=1, sampling_params=params, include_prompt_logprobs=True, topk_prompt_logprobs=3
    ).result()
    assert len(listed.prompt_logprobs) == 7
    assert len(listed.topk_prompt_logprobs[-1]) == 3
    assert named.get_base_model() == model
    return {"sampler": path}


def management(service: Any, client: Any, paths: dict[str, str], run_id: str) -> dict[str, Any]:
    """Listing, expiry, deletion, the files of an export."""
    rest = service.create_rest_client()
    run = rest.get_training_run(run_id).result()
    assert run.training_run_id == run_id
    assert run.is_lora
    assert run_id in [r.training_run_id for r in rest.list_training_runs().result().training_runs]
    kinds = {c.tinker_path: c.checkpoint_type for c in rest.list_checkpoints(run_id).result().checkpoints}
    assert kinds[paths["saved"]] == "training"
    assert kinds[paths["sampler"]] == "sampler"
    rest.set_checkpoint_ttl_from_tinker_path(paths["saved"], 3600).result()
    info = rest.get_weights_info_by_tinker_path(paths["saved"]).result()
    assert info.is_lora
    external = client.save_weights_external("whole").result().path
    urls = rest.get_external_weights_urls(external).result().urls
    with tempfile.TemporaryDirectory() as folder:
        for name, url in urls.items():
            with urllib.request.urlopen(url) as answer:
                Path(folder, name).write_bytes(answer.read())
        files = sorted(p.name for p in Path(folder).iterdir())
        assert json.loads(Path(folder, "adapter_config.json").read_text())["r"] == 4
    rest.delete_checkpoint_from_tinker_path(paths["saved"]).result()
    left = [c.tinker_path for c in rest.list_checkpoints(run_id).result().checkpoints]
    assert paths["saved"] not in left
    return {"files": files, "left": len(left)}


def main() -> None:
    """Do it all; an assertion or an exception is the failure."""
    base_url, key, model = sys.argv[1:]
    service = tinker.ServiceClient(base_url=base_url, api_key=key)
    offered = [m.model_name for m in service.get_server_capabilities().supported_models]
    assert model in offered
    client = made(service.create_lora_training_client(base_model=model, rank=4, seed=1, user_metadata={"by": "test"}))
    info = client.get_info()
    assert info.lora_rank == 4
    seen: dict[str, Any] = {"version": tinker.__version__, "losses": losses(client)}
    seen["loss_on_server"] = loss_by_handle(service, client)
    alternatives(client)
    paths = checkpoints(service, client)
    paths |= sampling(service, client, model)
    seen |= management(service, client, paths, info.model_id)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
