"""Two tenants on one server: neither sees, moves or stops anything of the other."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyrage
import pytest
from google.protobuf.message import Message

from tests.server.rpc.raw_client import RawClient, batch
from tests.tg_tinker.ledger.test_audits import RESULT
from tg_tinker.errors import AuthenticationError, AuthorizationError, ResourceNotFoundError, TGTinkerError
from tg_tinker.proto.v1 import artifacts_pb2, datasets_pb2, federation_pb2, privacy_pb2, runs_pb2, sampling_pb2
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.types.records import Record
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import SampleQuery
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Generate, Load, Position, Save, Step, Updates
from tg_tinker.wire.datasets import append_records
from tg_tinker.wire.methods import methods
from tg_tinker.wire.operations import cancel_future_request, get_future_request, resume_request
from tg_tinker.wire.tokens import query_to_proto
from tg_tinker_server.app import EmbeddedServer

RECIPIENT = str(pyrage.x25519.Identity.generate().to_public())
CONFIG = TrainingConfig(model_ref="bigram", batch_size=4, seed=1)
PRIVATE = CONFIG.model_copy(update={"dp_config": DPConfig(dataset_id="secret-data", target_epsilon=100.0)})


def requests_on(
    run_id: str, artifact_id: str, dataset_id: str, upload_id: str, sampler_id: str = ""
) -> list[Message]:
    """One request for each method that takes somebody's id."""
    position = Position(run_id=run_id, seq=99)
    vectors = np.zeros((1, 3), np.float32)
    calls = [batch(), batch(train=False), Step(), Save(), Load(artifact_id=artifact_id), Generate(prompts=("x",))]
    calls.append(Updates(vectors_UP=vectors, units=("u",)))
    return [
        *(call_to_proto(call, position) for call in calls),
        sampling_pb2.SampleStreamRequest(run_id=run_id, prompt="x"),
        sampling_pb2.EncodeRequest(run_id=run_id, texts=["x"]),
        sampling_pb2.DecodeRequest(run_id=run_id),
        sampling_pb2.EncodeRequest(sampler_id=sampler_id, texts=["x"]),
        sampling_pb2.DecodeRequest(sampler_id=sampler_id),
        sampling_pb2.CreateSamplerRequest(path=artifact_id),
        sampling_pb2.GetSamplerRequest(sampler_id=sampler_id),
        sampling_pb2.DeleteSamplerRequest(sampler_id=sampler_id),
        query_to_proto(SampleQuery(prompt=(1,)), sampler_id=sampler_id),
        runs_pb2.GetTrainingClientRequest(run_id=run_id),
        runs_pb2.DeleteTrainingClientRequest(run_id=run_id),
        runs_pb2.UnloadModelRequest(run_id=run_id),
        resume_request(run_id, [1]),
        get_future_request(Position(run_id=run_id, seq=1), wait_s=0),
        get_future_request(f"{run_id}.1", wait_s=0),
        cancel_future_request(f"{run_id}.1"),
        artifacts_pb2.PullArtifactRequest(artifact_id=artifact_id),
        federation_pb2.PullWeightsRequest(run_id=run_id),
        artifacts_pb2.DeleteArtifactRequest(artifact_id=artifact_id),
        artifacts_pb2.GetArtifactRequest(artifact_id=artifact_id),
        artifacts_pb2.SetArtifactTTLRequest(artifact_id=artifact_id, ttl_seconds=1),
        runs_pb2.CreateTrainingClientRequest(like=artifact_id),
        artifacts_pb2.ExportArtifactRequest(artifact_id=artifact_id, recipients=[RECIPIENT]),
        privacy_pb2.GetLedgerRequest(dataset_id=dataset_id),
        privacy_pb2.GetPrivacyReportRequest(dataset_id=dataset_id),
        privacy_pb2.AttachAuditRequest(dataset_id=dataset_id, result_json=json.dumps(RESULT)),
        privacy_pb2.ForecastPrivacyRequest(run_id=run_id, steps=1),
        append_records(upload_id, 0, [(Record(text="x").to_bytes(), 0)]),
        datasets_pb2.SealDatasetRequest(upload_id=upload_id),
        datasets_pb2.GetDatasetRequest(dataset_id=dataset_id),
        datasets_pb2.ListRecordIdsRequest(dataset_id=dataset_id),
        datasets_pb2.EraseRecordsRequest(dataset_id=dataset_id, record_ids=bytes(16)),
        datasets_pb2.DeleteDatasetRequest(dataset_id=dataset_id),
        datasets_pb2.RaiseBudgetRequest(dataset_id=dataset_id, target_epsilon=1e3, reason="because"),
    ]


def register(client: RawClient, dataset_id: str, upload_id: str) -> None:
    client.send(
        datasets_pb2.CreateDatasetRequest(
            upload_id=upload_id,
            dataset_id=dataset_id,
            privacy_unit="datum",
            target_epsilon=100.0,
            target_delta=1e-5,
            num_records=5,
            num_slots=5,
        )
    )
    client.send(append_records(upload_id, 0, [(Record(text=f"record {i}").to_bytes(), i) for i in range(5)]))
    client.send(datasets_pb2.SealDatasetRequest(upload_id=upload_id))


WITHOUT_IDS = {
    "CreateCustomLoss",
    "GetTokenizer",
    "ListTrainingClients",
    "GetCapabilities",
    "ListArtifacts",
    "GetAuditLog",
    "ImportArtifact",
    "ImportWeights",
    "NoteFederation",
    "GetCheckpoint",
    "GetLogEntries",
    "CreateDataset",
    "ListDatasets",
}


def answer(client: RawClient, request: Message) -> tuple[Any, ...]:
    with pytest.raises(TGTinkerError) as caught:
        client.send(request)
    error = caught.value
    return type(error), error.message, {k: v for k, v in error.details.items() if k != "resource_id"}


def test_every_method_with_an_id_is_in_the_list() -> None:
    covered = {type(r) for r in requests_on("r", "a", "d", "u", "s")}
    assert {m.name for m in methods() if m.request not in covered} == WITHOUT_IDS


def test_a_foreign_id_and_a_missing_id_give_the_same_answer_and_change_nothing(bigram_server: EmbeddedServer) -> None:
    owner = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    every_role = ("trainer", "exporter", "auditor", "budget_officer")
    stranger = RawClient(bigram_server.address, bigram_server.mint_key("tenant-b", every_role))
    register(owner, "secret-data", "upload-1")
    run = owner.create(PRIVATE)
    assert owner.call(run.run_id, 1, batch()).status == "completed"
    assert owner.call(run.run_id, 2, Step()).status == "completed"
    saved = owner.call(run.run_id, 3, Save()).result
    before = owner.send(runs_pb2.GetTrainingClientRequest(run_id=run.run_id))
    sampler_id = owner.send(sampling_pb2.CreateSamplerRequest(path=saved.artifact_id)).sampler_id
    theirs = requests_on(run.run_id, saved.artifact_id, "secret-data", "upload-1", sampler_id)
    nobodys = requests_on("run_" + "0" * 24, "ckpt_" + "0" * 24, "no-such-data", "upload-2", "smp_" + "0" * 24)
    for foreign, missing in zip(theirs, nobodys, strict=True):
        got = answer(stranger, foreign)
        assert got[0] is ResourceNotFoundError, foreign
        assert got == answer(stranger, missing)
    assert owner.send(runs_pb2.GetTrainingClientRequest(run_id=run.run_id)) == before
    assert len(owner.send(datasets_pb2.ListRecordIdsRequest(dataset_id="secret-data")).record_ids) == 5 * 16
    assert stranger.send(datasets_pb2.ListDatasetsRequest()).datasets == []
    assert stranger.send(runs_pb2.ListTrainingClientsRequest()).runs == []
    assert stranger.send(artifacts_pb2.ListArtifactsRequest()).artifacts == []
    assert stranger.send(privacy_pb2.GetAuditLogRequest()).entries_json == []


def test_a_stranger_cannot_load_anothers_checkpoint_into_a_run_of_its_own(bigram_server: EmbeddedServer) -> None:
    owner = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    stranger = RawClient(bigram_server.address, bigram_server.mint_key("tenant-b"))
    run = owner.create(CONFIG)
    saved = owner.call(run.run_id, 1, Save()).result
    mine = stranger.create(CONFIG)
    got = stranger.call(mine.run_id, 1, Load(artifact_id=saved.artifact_id))
    assert isinstance(got.error, ResourceNotFoundError)
    with pytest.raises(ResourceNotFoundError):
        stranger.send(
            runs_pb2.CreateTrainingClientRequest(
                request_id="x", config_json=mine.config_json, checkpoint_id=saved.artifact_id
            )
        )


def test_two_tenants_may_use_the_same_dataset_name_without_sharing_a_budget(bigram_server: EmbeddedServer) -> None:
    one = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    two = RawClient(bigram_server.address, bigram_server.mint_key("tenant-b"))
    first, second = one.create(PRIVATE), two.create(PRIVATE)
    one.call(first.run_id, 1, batch())
    assert one.call(first.run_id, 2, Step()).status == "completed"
    spent = two.send(privacy_pb2.GetLedgerRequest(dataset_id="secret-data")).epsilon_spent
    assert spent == 0.0
    assert second.privacy.epsilon_spent == 0.0


def test_one_tenants_bad_batches_leave_the_others_losses_bit_for_bit(bigram_server: EmbeddedServer) -> None:
    def losses(neighbour_misbehaves: bool) -> list[float]:
        good = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
        bad = RawClient(bigram_server.address, bigram_server.mint_key("tenant-b"))
        run, other = good.create(CONFIG), bad.create(CONFIG)
        found, theirs = [], 0
        for step in range(4):
            if neighbour_misbehaves:
                for vocab, tokens in ((10**9, 12), (200, 5000)):
                    theirs += 1
                    assert bad.call(other.run_id, theirs, batch(step, vocab=vocab, tokens=tokens)).status == "failed"
                theirs += 1
                assert bad.call(other.run_id, theirs, Step()).status == "failed"
            found.append(good.call(run.run_id, 2 * step + 1, batch(step)).result.loss)
            assert good.call(run.run_id, 2 * step + 2, Step()).status == "completed"
        return found

    assert losses(neighbour_misbehaves=True) == losses(neighbour_misbehaves=False)


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        ("trainer", {"READ", "TRAIN", "SAMPLE"}),
        ("sampler", {"READ", "SAMPLE"}),
        ("exporter", {"READ", "EXPORT"}),
        ("auditor", {"READ", "AUDIT"}),
        ("budget_officer", {"READ", "AUDIT", "BUDGET"}),
        ("admin", {"READ"}),
    ],
)
def test_each_role_may_do_what_it_says_and_nothing_else(
    bigram_server: EmbeddedServer, role: str, allowed: set[str]
) -> None:
    client = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a", (role,)))
    for method in methods():
        request = method.request()
        if method.scope in allowed:
            try:
                client.send(request)
            except AuthorizationError:  # pragma: no cover
                pytest.fail(f"{role} was refused {method.name}")
            except TGTinkerError:
                pass  # an empty request may be wrong, but it was let in
        else:
            with pytest.raises(AuthorizationError):
                client.send(request)


def test_no_key_a_wrong_key_and_a_revoked_key_open_nothing(bigram_server: EmbeddedServer) -> None:
    good = bigram_server.mint_key("tenant-a")
    last = "0" if good[-9] != "0" else "1"
    for key in (None, "nonsense", good[:-9] + last + good[-8:]):
        with pytest.raises(AuthenticationError):
            RawClient(bigram_server.address, key).send(runs_pb2.GetCapabilitiesRequest())
    client = RawClient(bigram_server.address, good)
    client.send(runs_pb2.GetCapabilitiesRequest())
    bigram_server.revoke_key(good)
    import time

    time.sleep(1.0)
    with pytest.raises(AuthenticationError):
        client.send(runs_pb2.GetCapabilitiesRequest())


def test_greedy_sampling_works_for_the_owner(bigram_server: EmbeddedServer) -> None:
    owner = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    run = owner.create(CONFIG)
    call = Generate(prompts=("ab",), params=GenerationOptions(max_tokens=3, temperature=0.0))
    assert owner.call(run.run_id, 1, call).result.samples[0].num_tokens <= 3
