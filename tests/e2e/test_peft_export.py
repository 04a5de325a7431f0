"""PEFT loads an exported adapter and writes the same text as the server."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyrage
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tg_tinker_server
from tg_tinker import BatchData, LoRAConfig, OptimizerConfig, ServiceClient, TrainingConfig
from tg_tinker.exports import files
from tg_tinker.transparency.note import VerifierKey
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto.signing import TenantSigner

BASE = Path(tg_tinker_server.__file__).parent / "assets" / "tiny-llama-2m"
PROMPT = "Patient presents with"
TOKENS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # In float32 on both sides: what is compared is the adapter, not the rounding of the base.
    config = ServerConfig(port=0, base_dtype="float32", device="cpu", data_dir=tmp_path_factory.mktemp("data"))
    with EmbeddedServer(config) as running:
        yield running


def written_by_peft(folder: Path) -> tuple[str, list[str]]:
    """What PEFT makes of the prompt, and the keys it missed."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
    text = tokenizer.decode(out[0][ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text, [str(w.message) for w in said if "missing" in str(w.message).lower()]


@pytest.mark.parametrize(
    "lora",
    [
        # One stays in the default run; the others take seconds each.
        pytest.param(
            LoRAConfig(rank=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), id="a module trained whole"
        ),
        pytest.param(LoRAConfig(rank=4), id="names", marks=pytest.mark.slow),
        pytest.param(
            LoRAConfig(rank=4, target_modules="all-linear", bias="all"), id="all-linear", marks=pytest.mark.slow
        ),
        pytest.param(
            LoRAConfig(rank=2, alpha=48.0, target_modules=["embed_tokens", "down_proj"]),
            id="an embedding",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_peft_loads_an_export_and_writes_what_the_server_writes(
    server: EmbeddedServer, tmp_path: Path, lora: LoRAConfig
) -> None:
    identity = pyrage.x25519.Identity.generate()
    with ServiceClient(server.mint_key(), server.address) as service:
        optimizer = OptimizerConfig(learning_rate=0.01)
        config = TrainingConfig(
            model_ref="tiny-llama-2m", batch_size=4, seed=1, lora_config=lora, optimizer=optimizer
        )
        client = service.create_training_client(config)
        untrained = client.sample(PROMPT, max_tokens=TOKENS, temperature=0.0).samples[0].completion
        for seed in range(3):
            client.forward_backward(
                BatchData(input_ids=np.random.default_rng(seed).integers(1, 200, (4, 12)))
            ).result()
            client.optim_step().result()
        trained = client.sample(PROMPT, max_tokens=TOKENS, temperature=0.0).samples[0].completion
        saved = client.save_state()
        service.export_artifact(saved.artifact_id, str(identity.to_public()), tmp_path / "e.age")
    assert trained != untrained
    key = VerifierKey.parse(TenantSigner(server._foundation.keyring).signer("default").verifier_key)
    files.unpack(tmp_path / "e.age", key, tmp_path / "adapter", [str(identity)])
    assert written_by_peft(tmp_path / "adapter") == (trained, [])
