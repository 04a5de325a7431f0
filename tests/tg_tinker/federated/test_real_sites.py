"""A coordinator and sites, each with a real server's tenant of its own: what the whole comes to."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tg_tinker.federated.coordinating import Killed, coordinator, link_to
from tests.tg_tinker.federated.jobs import names
from tests.tg_tinker.federated.site_lab import TEXTS, Crash, Party, Tripwire
from tg_tinker import ServiceClient
from tg_tinker.data import collate
from tg_tinker.federated.adapter_store import AdapterStore
from tg_tinker.federated.statement import verify_statement
from tg_tinker.types import TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

SGD = {"name": "sgd", "learning_rate": 0.5, "momentum": 0.0, "nesterov": False}
OPEN = {"require_record_privacy": False, "max_local_steps": 10}


@pytest.fixture
def server(tmp_path):
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "server")) as server:
        yield server


@pytest.fixture
def service(server):
    with ServiceClient(server.mint_key("coordinator"), server.address) as service:
        yield service


def parties(server, folder, groups, *, policy=None, **terms):
    """One site for each group of texts, with its own tenant, and a link to them."""
    found = []
    for name, texts in zip(names(len(groups)), groups, strict=True):
        key = server.mint_key(f"tenant-{folder.name}-{name}")
        party = Party(
            server, folder / name, name=name, policy={"public_units": len(texts), **(policy or {})}, api_key=key
        )
        party.register(texts, **terms)
        found.append(party)
    return found


def table_of(service, result):
    return AdapterStore(service, result.job).load(result.artifact_id)["table"]


def plain(sites, records, **settings):
    return {
        "sites": sites, "records": None, "batch_size": records, "rounds": 1, "optimizer": SGD, **settings
    }  # fmt: skip


def test_one_round_of_two_owners_is_the_step_of_one_owner_of_everything(tmp_path, server, service):
    texts = TEXTS[:8]
    two = parties(server, tmp_path / "two", [texts[:4], texts[4:]], policy=OPEN, target_epsilon=None)
    one = parties(server, tmp_path / "one", [texts], policy=OPEN, target_epsilon=None)
    federated = coordinator(tmp_path / "a", service, job=plain(2, 4)).run(link_to(two))
    pooled = coordinator(tmp_path / "b", service, job=plain(1, 8)).run(link_to(one))
    assert (federated.status, pooled.status) == ("finished", "finished"), (federated.why, pooled.why)
    table = table_of(service, federated)
    np.testing.assert_allclose(table, table_of(service, pooled), atol=1e-6)
    # And the same by a run that knows of no federation at all.
    run = service.create_training_client(TrainingConfig(model_ref="bigram", optimizer=SGD, batch_size=8))
    run.forward_backward(collate(run.encode_batch(texts))).result()
    run.optim_step().result()
    np.testing.assert_allclose(table, run.pull_weights().tensors["table"], atol=1e-6)
    assert np.abs(table).max() > 0.01


def test_several_rounds_of_one_step_are_several_central_steps(tmp_path, server, service):
    groups = [TEXTS[0:4], TEXTS[4:8], TEXTS[8:12]]
    sites = parties(server, tmp_path / "sites", groups, policy=OPEN, target_epsilon=None)
    result = coordinator(tmp_path, service, job=plain(3, 4, rounds=4)).run(link_to(sites))
    run = service.create_training_client(TrainingConfig(model_ref="bigram", optimizer=SGD, batch_size=12))
    batch = collate(run.encode_batch(TEXTS[:12]))
    for _ in range(4):
        run.forward_backward(batch).result()
        run.optim_step().result()
    np.testing.assert_allclose(table_of(service, result), run.pull_weights().tensors["table"], atol=1e-6)


def test_a_masked_round_comes_to_the_same_within_the_grid(tmp_path, server, service):
    groups = [TEXTS[0:4], TEXTS[4:8], TEXTS[8:12]]
    sites = parties(server, tmp_path / "sites", groups, policy=OPEN, target_epsilon=None)
    masked = {"masking": {"clip": 1.0, "bits": 24}, "min_sites": 2}
    link = link_to(sites)
    result = coordinator(tmp_path, service, job=plain(3, 4, **masked)).run(link)
    assert result.status == "finished", result.why
    run = service.create_training_client(TrainingConfig(model_ref="bigram", optimizer=SGD, batch_size=12))
    run.forward_backward(collate(run.encode_batch(TEXTS[:12]))).result()
    run.optim_step().result()
    np.testing.assert_allclose(table_of(service, result), run.pull_weights().tensors["table"], atol=1e-6)
    assert {value.dtype.str for reply in link.received for value in reply.arrays.values()} == {"<u4"}


def test_each_site_spends_and_states_its_own_epsilon_and_kills_on_both_sides_cost_no_second_charge(
    tmp_path, server, service
):
    sites = parties(server, tmp_path / "sites", [TEXTS[:20], TEXTS[:20]], target_epsilon=8.0)
    job = {"sites": 2, "rounds": 3, "local_steps": 2, "records": {}, "batch_size": 4, "min_sites": 2}
    link = link_to(sites)
    # The first site's process dies in the middle of its second round; the coordinator's while the third is under way.
    wire, honest = Tripwire(at=12), link.handlers["site-0"]

    def dying(request):
        return sites[0].handle(request, wire=wire) if request.round == 2 else honest(request)

    def crashing(request):
        try:
            return dying(request)
        except Crash:
            return request.reply()  # unsigned: the carrier's own answer

    def kill(request):
        if (request.round, request.site) == (3, "site-1"):
            raise Killed

    link.handlers["site-0"], link.before = crashing, kill
    with pytest.raises(Killed):
        coordinator(tmp_path, service, job=job).run(link)
    link.before = lambda _: None
    result = coordinator(tmp_path, service, job=job).run(link)
    assert result.status == "finished", result.why
    assert len(wire.passed) > 12
    assert result.rounds[1].attempts == 2
    assert (result.records.epsilon, result.records.people) == (16.0, "shared")
    for party in sites:
        stated = verify_statement(result.statements[party.name], result.job.roster[party.name])
        assert stated.rounds == (1, 2, 3)
        assert 0 < stated.epsilon_spent <= 8.0
        assert party.charges() == 6


def test_a_site_whose_policy_is_broken_stays_out_and_its_audit_log_says_so(tmp_path, server, service):
    sites = parties(server, tmp_path / "sites", [TEXTS[:20], TEXTS[:20]], target_epsilon=8.0)
    sites[1].policy = {"max_rounds": 2}
    result = coordinator(tmp_path, service, job={"sites": 2, "rounds": 3, "records": {}}).run(link_to(sites))
    assert result.status == "finished"
    assert result.left["site-1"].reason == "policy"
    assert "max_rounds" in result.left["site-1"].message or "rounds" in result.left["site-1"].message
    assert [f["reason"] for f in sites[1].audit("federation.join_refused")] == ["policy"]
    assert sites[1].charges() == 0


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["freeze_a", "alternate"])
def test_a_frozen_factor_of_a_language_model_stays_bit_for_bit_from_round_to_round(tmp_path, sharing):
    pytest.importorskip("torch")
    with (
        EmbeddedServer(ServerConfig(port=0, data_dir=tmp_path / "server")) as server,
        ServiceClient(server.mint_key("coordinator"), server.address) as service,
    ):
        policy = {**OPEN, "base_models": ("tiny-llama-2m",)}
        groups = [TEXTS[0:4], TEXTS[4:8]]
        sites = parties(server, tmp_path / "sites", groups, policy=policy, target_epsilon=None)
        settings = {"base_model": "tiny-llama-2m", "adapter": {"rank": 4}, "federated_lora": sharing}
        seen = {}

        def evaluate(released):
            seen[released.round] = released.weights
            return {}

        job = plain(2, 4, rounds=3, max_sequence_length=64, **settings)
        link = link_to(sites)
        result = coordinator(tmp_path, service, job=job, evaluate=evaluate).run(link)
        assert result.status == "finished", result.why
        for round_ in (1, 2, 3):
            frozen = f"lora_{'A' if result.job.frozen_factor(round_) == 'a' else 'B'}"
            for name, value in seen[round_].items():
                stays = value.tobytes() == seen[round_ - 1][name].tobytes()
                assert stays == (frozen in name), (round_, name)
            sent = {n for r in link.received if r.kind == "train" and r.round == round_ for n in r.arrays}
            assert sent == {n for n in seen[round_] if frozen not in n}
