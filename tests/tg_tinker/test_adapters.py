"""Adapters out as PEFT loads them and back in, and folders that are none."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.server.engine.conftest import LOADERS
from tg_tinker import Datum, DPConfig, InvalidRequestError, LoRAConfig, ModelInput, ServiceClient, TrainingConfig
from tg_tinker.adapters import read_adapter
from tg_tinker.types.optim import AdamParams
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.torch_backend import TorchBackend

DATA = [Datum(ModelInput.from_ints([1, 5, 9]), {"target_tokens": [5, 9, 2], "weights": [1.0, 1.0, 1.0]})]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    config = ServerConfig(port=0, data_dir=tmp_path_factory.mktemp("server"), log_level="error")
    with (
        EmbeddedServer(config, TorchBackend({"tiny": LOADERS["tiny"]})) as server,
        ServiceClient(api_key=server.mint_key("clinic"), base_url=server.address) as client,
    ):
        yield client


def lora_run(service, **settings):
    return service.create_lora_training_client("tiny", 4, 7, train_unembed=False, max_sequence_length=16, **settings)


def loss(tc):
    return tc.forward(DATA).result().metrics["loss:sum"]


def test_out_as_a_folder_and_in_again(service, tmp_path):
    tc = lora_run(service)
    for _ in range(3):
        tc.forward_backward(DATA, "cross_entropy")
        tc.optim_step(AdamParams(learning_rate=0.05)).result()
    saved = tc.save_state("trained")
    manifest = service.download_adapter(saved.path, tmp_path / "adapter")
    assert manifest is not None
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"]) == (4, "LORA")
    theirs = load_file(next((tmp_path / "adapter").glob("adapter*.safetensors")))
    ours = tc.pull_weights().tensors
    assert set(theirs) == set(ours)
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name].astype(np.float32), array)
    with pytest.raises(InvalidRequestError):
        service.download_adapter(saved.path, tmp_path / "adapter")  # it exists
    taken = service.import_adapter(tmp_path / "adapter", base_model="tiny")
    adapter = read_adapter(tmp_path / "adapter")[1]
    other = service.create_training_client(
        TrainingConfig(model_ref="tiny", lora_config=adapter, max_sequence_length=16), taken.artifact_id
    )
    assert loss(other) == pytest.approx(loss(tc), rel=1e-6)


def test_a_private_run_takes_no_weights_that_promise_nothing(service, tmp_path):
    tc = lora_run(service)
    service.download_adapter(tc.save_state().artifact_id, tmp_path / "adapter")
    taken = service.import_adapter(tmp_path / "adapter", base_model="tiny")
    dp = {"noise_multiplier": 1.0, "target_epsilon": None}
    strict = lora_run(service, dp_config=DPConfig(dataset_id="strict-1", **dp), batch_size=1)
    with pytest.raises(InvalidRequestError):
        strict.load_state(taken.artifact_id)


@pytest.mark.parametrize(("flag", "part"), [("train_mlp", "mlp"), ("train_attn", "self_attn")])
def test_groups_that_are_left_out_have_no_adapter(service, flag, part):
    whole = lora_run(service).pull_weights().tensors
    less = lora_run(service, **{flag: False}).pull_weights().tensors
    assert any(part in name for name in whole)
    assert not any(part in name for name in less)
    assert {a.shape[0] for n, a in whole.items() if "lora_A" in n} == {4}
    assert {a.shape[1] for n, a in whole.items() if "lora_B" in n} == {4}


def test_the_seed_fixes_every_bit(service):
    first, second = (lora_run(service).pull_weights().tensors for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_what_the_run_is_called(service):
    tc = service.create_lora_training_client("tiny", user_metadata={"k": "v"}, max_sequence_length=16)
    info = tc.get_info()
    assert (info.is_lora, info.lora_rank, info.model_data.arch) == (True, 32, "llama")
    assert tc.config.metadata == {"k": "v"}
    assert tc.config.lora_config.alpha == 32


@pytest.fixture
def folder(tmp_path):
    tensors = {"base_model.model.q.lora_A.weight": np.ones((2, 4), np.float16)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})  # as PEFT does
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_is_read(folder):
    tensors, config, digest = read_adapter(folder)
    assert tensors["base_model.model.q.lora_A.weight"].dtype == np.float32
    assert config == LoRAConfig(rank=2, alpha=4, target_modules=["q"])
    assert len(digest) == 64
    (folder / "adapter_model.safetensors").rename(folder / "adapter.safetensors")
    assert read_adapter(folder)[2] == digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "plain LoRA"),
        ({"use_dora": True}, "plain LoRA"),
        ({"rank_pattern": {"q": 8}}, "plain LoRA"),
        ({"r": 0}, "cannot be"),
        ({"target_modules": None}, "cannot be"),
    ],
)
def test_other_adapters_are_refused(folder, change, says):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(InvalidRequestError, match=says) as caught:
        read_adapter(folder)
    assert caught.value.field == "folder"


def test_pickles_and_damaged_files_are_not_opened(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidRequestError, match="pickles are not opened"):
        read_adapter(folder)
