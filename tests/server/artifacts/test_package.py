"""What stands in an export's documents."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.support.exports import CLAIM, KEY, LORA, MODEL_SIGNER, SIGNER, files, source
from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports.manifest import open_manifest
from tg_tinker.exports.tar import ADAPTER_CONFIG, CARD, MANIFEST
from tg_tinker.reports.card import guarantee
from tg_tinker_server.artifacts.package import adapter_config, documents


def test_target_modules_are_pefts_own_names_or_every_path() -> None:
    assert adapter_config(source())["target_modules"] == ["q_proj"]
    config = {"model_ref": "m", "lora_config": {**LORA, "target_modules": "all-linear"}}
    names = [
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
        "base_model.model.model.embed.lora_embedding_A",
        "base_model.model.lm_head.modules_to_save.weight",
    ]
    made = replace(source(config=config), weight_names=names)
    assert adapter_config(made)["target_modules"] == ["model.embed", "model.layers.0.mlp.up_proj"]


def test_the_base_model_is_named_as_the_receiver_finds_it() -> None:
    contents = files()
    assert json.loads(contents[ADAPTER_CONFIG])["base_model_name_or_path"] == "org/tiny-llama"
    assert contents[CARD].startswith(b'---\nbase_model: "org/tiny-llama"\nlibrary_name: peft\n')
    assert open_manifest(contents[MANIFEST], KEY).predicate["base_model"] == "tiny-llama-2m"


def test_numbers_that_a_reader_computes_with_are_decimal_text() -> None:
    claims = open_manifest(files(source(ledger=CLAIM))[MANIFEST], KEY).predicate
    assert (claims["privacy"]["epsilon"], claims["privacy"]["delta"]) == ("1.5", "1e-05")
    assert (claims["lora_config"]["alpha"], claims["lora_config"]["dropout"]) == ("4.0", "0.0")


def test_the_promise_in_words_never_rounds_down() -> None:
    assert "exp(1.001)" in guarantee({**CLAIM, "epsilon": "1.0000001"})
    assert "one user" in guarantee({**CLAIM, "unit": "user"})
    assert "no finite guarantee" in guarantee({**CLAIM, "epsilon": "inf"})


def test_earlier_promises_stand_in_the_manifest_and_on_the_card() -> None:
    entry = {"artifact": "ckpt_00000000", "base_model": "m", "manifest": "", "origin": "", "privacy": CLAIM}
    contents = files(source(provenance=[entry]))
    (found,) = open_manifest(contents[MANIFEST], KEY).predicate["provenance"]
    assert found == {**entry, "origin": SIGNER.origin}
    assert "promises of their own" in contents[CARD].decode()


def test_a_document_larger_than_readers_take_is_not_written() -> None:
    made = replace(source(), report={"report.json": b"x" * (64 * 2**20 + 1)})
    with pytest.raises(InvalidRequestError, match=r"report\.json"):
        documents(made, "00" * 32, SIGNER, MODEL_SIGNER)
