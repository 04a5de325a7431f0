"""Real adapters at a site: a frozen factor is neither sent nor moved, and a crash changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tg_tinker.federated.site_lab import Crash, Party, Tripwire, site_job
from tg_tinker.federated.updates import check_update, trained_names, weights_digest
from tg_tinker.types import LoRAConfig, TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

pytest.importorskip("torch")
MODEL = "tiny-llama-2m"
ADAPTER = {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with EmbeddedServer(ServerConfig(port=0, data_dir=tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture(scope="module")
def weights(server):
    """An adapter as a coordinator draws it, with B off zero so that A has a gradient."""
    from tg_tinker import ServiceClient

    with ServiceClient(api_key=server.mint_key("coordinator"), base_url=server.address) as service:
        config = TrainingConfig(model_ref=MODEL, lora_config=LoRAConfig(**ADAPTER), seed=1)
        drawn = service.create_training_client(config).pull_weights().tensors
    rng = np.random.default_rng(0)
    return {
        name: array if "lora_A" in name else rng.normal(0, 0.02, array.shape).astype(np.float32)
        for name, array in drawn.items()
    }


@pytest.fixture
def party(server, tmp_path, request):
    tenant = f"tenant-of-{abs(hash(request.node.nodeid))}"
    rules = {"base_models": (MODEL,), "require_record_privacy": False, "public_units": 6}
    party = Party(server, tmp_path, policy=rules, api_key=server.mint_key(tenant))
    party.register([f"fever on day {i}" for i in range(6)], target_epsilon=None)
    return party


def job_of(weights, **changes):
    fields = {
        "base_model": MODEL,
        "adapter": ADAPTER,
        "adapter_digest": weights_digest(weights),
        "records": None,
        "batch_size": 6,
        "max_sequence_length": 64,
        "rounds": 4,
        **changes,
    }
    return site_job(**fields)


def move(weights, update):
    return {name: weights[name] + update.get(name, np.float32(0)) for name in weights}


def test_alternating_rounds_train_and_send_one_factor_each(party, weights):
    job = job_of(weights, federated_lora="alternate")
    party.join(job)
    for round_, sent in ((1, "lora_B"), (2, "lora_A"), (3, "lora_B")):
        reply = party.ask(job, "train", round_, arrays=weights)
        assert reply.facts == {}
        assert set(reply.arrays) == set(trained_names(weights, job.frozen_factor(round_)))
        assert all(sent in name for name in reply.arrays)
        assert all(float(np.abs(array).max()) > 0 for array in reply.arrays.values())
        check_update(reply.arrays, weights, job.frozen_factor(round_))
        weights = move(weights, reply.arrays)
    with party.state() as state:
        runs = {key: state.run_id(job.digest(), key) for key in ("", "a", "b")}
    assert runs[""] is None
    assert runs["a"] != runs["b"]
    with party.service() as service:
        for key in ("a", "b"):
            assert service.get_training_client(runs[key]).config.lora_config.frozen_factor == key


def test_both_factors_are_trained_where_the_job_says_so(party, weights):
    job = job_of(weights, federated_lora="both")
    party.join(job)
    reply = party.ask(job, "train", 1, arrays=weights)
    assert set(reply.arrays) == set(weights)
    assert all(float(np.abs(array).max()) > 0 for array in reply.arrays.values())


def test_a_crash_changes_no_bit_of_an_adapters_update(party, weights):
    first = job_of(weights, federated_lora="freeze_a")
    party.join(first)
    wire = Tripwire()
    expected = party.ask(first, "train", 1, arrays=weights, wire=wire).arrays
    for nth, name in enumerate(("after import_weights", "after forward_backward", "before pull_weights")):
        job = job_of(weights, federated_lora="freeze_a", job_id=f"again-{nth}")
        party.join(job)
        at = len(wire.passed) - 1 - wire.passed[::-1].index(name)
        with pytest.raises(Crash):
            party.ask(job, "train", 1, arrays=weights, wire=Tripwire(at=at))
        again = party.ask(job, "train", 1, attempt=2, arrays=weights).arrays
        for key, array in expected.items():
            np.testing.assert_array_equal(again[key], array, err_msg=name)
