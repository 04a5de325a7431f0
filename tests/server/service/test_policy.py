"""What a key's policy binds: no configuration, checkpoint, name or door gives its holder more than it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from tests.server.rpc.raw_client import RawClient, batch
from tests.server.rpc.test_tenants import WITHOUT_IDS, answer, register, requests_on
from tg_tinker.errors import AuthorizationError, InvalidRequestError, ResourceNotFoundError
from tg_tinker.proto.v1 import (
    artifacts_pb2,
    datasets_pb2,
    privacy_pb2,
    runs_pb2,
    sampling_pb2,
)
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.types.datum import Datum, ModelInput
from tg_tinker.types.losses import Loss
from tg_tinker.wire.calls import Load, LossPass, Save, Step
from tg_tinker.wire.methods import method_of, methods
from tg_tinker.wire.requests import create_run
from tg_tinker.wire.runs import config_from_json, config_to_json
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.cli import keys
from tg_tinker_server.service.caller import SCOPES_OF_ROLE
from tg_tinker_server.service.policy import KeyPolicy

POLICY = KeyPolicy(dataset_id="people", target_epsilon=8.0, target_delta=1e-6, noise_multiplier=1.5)
CONFIG = TrainingConfig(model_ref="bigram", batch_size=4, seed=1)
EVERY_ROLE = tuple(SCOPES_OF_ROLE)


def asking(**settings: Any) -> TrainingConfig:
    return CONFIG.model_copy(update={"dp_config": DPConfig(**settings)})


def test_what_is_left_open_is_filled_in() -> None:
    applied = POLICY.apply(CONFIG)
    dp = applied.dp_config
    assert dp is not None
    assert dp.enabled
    assert (dp.dataset_id, dp.target_epsilon, dp.target_delta) == ("people", 8.0, 1e-6)
    assert (dp.noise_multiplier, dp.diagnostics, dp.sampling) == (1.5, "off", "none")
    assert POLICY.apply(asking()) == applied  # a DPConfig of defaults asks for nothing
    assert POLICY.apply(applied).model_dump() == applied.model_dump()
    assert applied.model_ref == "bigram"
    assert applied.batch_size == 4


def test_what_is_stricter_is_taken() -> None:
    dp = POLICY.apply(asking(noise_multiplier=9.0, max_grad_norm=0.1, dataset_id=None)).dp_config
    assert dp is not None
    assert (dp.noise_multiplier, dp.max_grad_norm, dp.dataset_id) == (9.0, 0.1, "people")


LOOSER: dict[str, tuple[KeyPolicy, dict[str, Any]]] = {
    "another dataset": (POLICY, {"dataset_id": "people2"}),
    "another spelling of it": (POLICY, {"dataset_id": "People"}),
    "no privacy": (POLICY, {"enabled": False}),
    "a larger target": (POLICY, {"target_epsilon": 8.1}),
    "another target": (POLICY, {"target_epsilon": 4.0}),
    "no target": (POLICY, {"target_epsilon": None}),
    "an infinite target": (POLICY, {"target_epsilon": float("inf")}),
    "a larger delta": (POLICY, {"target_delta": 1e-5}),
    "another unit": (POLICY, {"privacy_unit": "sequence"}),
    "less noise": (POLICY, {"noise_multiplier": 1.49}),
    "noise by another rule": (POLICY, {"noise_multiplier": "auto"}),
    "exact figures": (POLICY, {"diagnostics": "owner"}),
    "a draw that it attests": (POLICY, {"sampling": "poisson", "dataset_size": 10**5}),
    "participation that it counts": (POLICY, {"sampling": "max_participation", "max_participation": 10**6}),
    "a step without noise": (POLICY, {"target_epsilon": None, "allow_unnoised_steps": True}),
    "weights that it attests": (POLICY, {"initial_weights": "public"}),
    "losses that it attests": (POLICY, {"custom_loss": "independent"}),
    "more participation": (
        POLICY.model_copy(update={"sampling": "max_participation", "max_participation": 3}),
        {"max_participation": 4},
    ),
    "fixed noise for auto": (
        POLICY.model_copy(update={"noise_multiplier": "auto", "planned_steps": 10}),
        {"noise_multiplier": 0.01},
    ),
}


@pytest.mark.parametrize("case", LOOSER)
def test_what_is_looser_is_refused_by_name(case: str) -> None:
    policy, settings = LOOSER[case]
    config = asking(**settings).model_copy(update={"max_steps": 10})
    with pytest.raises(InvalidRequestError) as refused:
        policy.apply(config)
    assert (refused.value.field or "").startswith("dp_config")
    if policy is POLICY:
        assert not policy.admits(config)


def test_fewer_steps_than_planned_would_be_less_noise() -> None:
    policy = POLICY.model_copy(update={"noise_multiplier": "auto", "planned_steps": 100})
    assert policy.apply(CONFIG).max_steps == 100
    assert policy.apply(CONFIG.model_copy(update={"max_steps": 200})).max_steps == 200
    with pytest.raises(InvalidRequestError) as refused:
        policy.apply(CONFIG.model_copy(update={"max_steps": 99}))
    assert refused.value.field == "max_steps"


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "dataset_id": st.none() | st.sampled_from(["people", "others"]),
        "target_epsilon": st.none() | st.sampled_from([4.0, 8.0, 80.0]),
        "target_delta": st.sampled_from([1e-7, 1e-6, 1e-3]),
        "noise_multiplier": st.sampled_from([0.1, 1.5, 3.0, "auto"]),
        "max_grad_norm": st.sampled_from([0.5, 100.0]),
        "privacy_unit": st.sampled_from(["datum", "user"]),
        "sampling": st.sampled_from(["none", "poisson", "max_participation"]),
        "dataset_size": st.just(10**5),
        "max_participation": st.sampled_from([1, 10**6]),
        "diagnostics": st.sampled_from(["owner", "off"]),
        "initial_weights": st.sampled_from(["base", "public"]),
        "custom_loss": st.sampled_from(["refuse", "independent"]),
        "allow_unnoised_steps": st.booleans(),
    },
)


@given(SETTINGS)
def test_whatever_is_asked_for_the_result_promises_no_less(settings: dict[str, Any]) -> None:
    """A second judge: what matters for epsilon is compared one by one, apart from the code."""
    try:
        config = asking(**settings).model_copy(update={"max_steps": 5})
    except ValueError:
        return  # no configuration at all
    try:
        dp = POLICY.apply(config).dp_config
    except InvalidRequestError:
        return
    assert dp is not None
    assert dp.enabled
    assert dp.dataset_id == "people"
    assert dp.target_epsilon is not None
    assert dp.target_epsilon <= 8.0
    assert dp.target_delta <= 1e-6
    assert dp.privacy_unit == "datum"
    assert dp.noise_multiplier != "auto"
    assert dp.noise_multiplier >= 1.5
    assert dp.sampling == "none"
    assert dp.diagnostics == "off"
    assert dp.initial_weights == "base"
    assert dp.custom_loss == "refuse"
    assert not dp.allow_unnoised_steps


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_multiplier": "auto"},
        {"noise_multiplier": 0.0},
        {"unit_of": "prompt"},
        {"unit_of": "prompt", "privacy_unit": "user"},
        {"unit_of": "adjacent_pair", "privacy_unit": "group"},
        {"sampling": "max_participation"},
        {"sampling": "poisson"},
        {"target_epsilon": float("inf")},
        {"dataset_id": " people"},
        {"epsilon": 1.0},
    ],
)
def test_a_policy_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        KeyPolicy(**{**POLICY.model_dump(), **settings})


def test_a_policy_survives_its_row() -> None:
    assert KeyPolicy.from_json(POLICY.to_json()) == POLICY


def test_a_key_is_made_with_a_policy_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('dataset_id = "people"\ntarget_epsilon = 8.0\ntarget_delta = 1e-6\nnoise_multiplier = 1.5\n')
    made = CliRunner().invoke(keys, ["create", "--data-dir", str(tmp_path / "data"), "--policy", str(file)])
    assert made.exit_code == 0, made.output
    from tg_tinker_server.config import ServerConfig
    from tg_tinker_server.foundation import Foundation

    foundation = Foundation.open(ServerConfig(data_dir=tmp_path / "data"))
    (row,) = foundation.desk.list()
    foundation.db.close()
    assert row.policy is not None
    assert KeyPolicy.from_json(row.policy) == POLICY
    file.write_text('dataset_id = "people"\nepsilon = 8.0\n')
    refused = CliRunner().invoke(keys, ["create", "--data-dir", str(tmp_path / "data"), "--policy", str(file)])
    assert refused.exit_code == 1
    assert "epsilon" in refused.output


class Desk:
    """A tenant's own key, and a key with a policy in every role, on one server."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self.owner = RawClient(server.address, server.mint_key("acme", EVERY_ROLE))
        self.bound = RawClient(server.address, server.mint_key("acme", EVERY_ROLE, policy=POLICY))

    def trained(self, config: TrainingConfig, name: str = "") -> tuple[str, str]:
        """A run of the owner after one step, and its checkpoint."""
        run = self.owner.create(config)
        assert self.owner.call(run.run_id, 1, batch()).status == "completed"
        assert self.owner.call(run.run_id, 2, Step()).status == "completed"
        saved: Any = self.owner.call(run.run_id, 3, Save(name=name)).result
        return run.run_id, saved.artifact_id


@pytest.fixture
def desk(bigram_server: EmbeddedServer) -> Desk:
    return Desk(bigram_server)


def as_policy(**changes: Any) -> TrainingConfig:
    applied = POLICY.apply(CONFIG)
    assert applied.dp_config is not None
    return applied.model_copy(update={"dp_config": applied.dp_config.model_copy(update=changes)})


OUTSIDE = {
    "without privacy": CONFIG,
    "another dataset": as_policy(dataset_id="others"),
    "its own dataset under its own name": as_policy(dataset_id=None),
    "its own dataset with less noise": as_policy(noise_multiplier=1.0),
    "its own dataset with exact figures": as_policy(diagnostics="owner"),
    "its own dataset from attested weights": as_policy(initial_weights="public"),
}

# Answered alike whatever they are asked of: a key with a policy may not do them at all.
NEVER = {"AppendRecords", "SealDataset", "EraseRecords", "DeleteDataset", "RaiseBudget"}


@pytest.mark.parametrize("case", OUTSIDE)
def test_every_method_answers_for_what_is_outside_as_for_what_is_missing(desk: Desk, case: str) -> None:
    run_id, artifact_id = desk.trained(OUTSIDE[case], name="last")
    # The ledger of its own dataset is the policy's own; of a run's own dataset, and of another, it is not.
    dp = OUTSIDE[case].dp_config
    dataset_id = "others" if dp is None else dp.dataset_id or run_id
    register(desk.owner, "registered", "upload-1")
    if dataset_id in ("others", "people"):
        dataset_id = "registered"
    missing_run, missing_artifact = "run_" + "0" * 24, "ckpt_" + "0" * 24
    pairs = zip(
        [
            *requests_on(run_id, artifact_id, dataset_id, "upload-1"),
            *by_path(f"tg://{run_id}/weights/last", f"tg://{run_id}/weights/{artifact_id}"),
        ],
        [
            *requests_on(missing_run, missing_artifact, "no-such-data", "upload-2"),
            *by_path(f"tg://{missing_run}/weights/last", f"tg://{missing_run}/weights/{missing_artifact}"),
        ],
        strict=True,
    )
    before = desk.owner.send(runs_pb2.GetTrainingClientRequest(run_id=run_id, summary=True))
    for outside, missing in pairs:
        got = answer(desk.bound, outside)
        expected = AuthorizationError if method_of(type(outside)).name in NEVER else ResourceNotFoundError
        assert got[0] is expected, outside
        assert got == answer(desk.bound, missing), outside
    assert desk.owner.send(runs_pb2.GetTrainingClientRequest(run_id=run_id, summary=True)) == before
    assert desk.bound.send(runs_pb2.ListTrainingClientsRequest()) == runs_pb2.ListTrainingClientsReply()
    assert desk.bound.send(artifacts_pb2.ListArtifactsRequest()) == artifacts_pb2.ListArtifactsReply()
    assert desk.bound.send(artifacts_pb2.ListArtifactsRequest(run_id=run_id)) == artifacts_pb2.ListArtifactsReply()
    assert desk.bound.send(datasets_pb2.ListDatasetsRequest()).datasets == []
    # Nor does it get in by another door: into a run of its own, or through a sampler.
    mine = desk.bound.send(create_run("mine", CONFIG, None))
    for seq, name in enumerate((artifact_id, f"tg://{run_id}/weights/last"), 1):
        assert isinstance(desk.bound.call(mine.run_id, seq, Load(artifact_id=name)).error, ResourceNotFoundError)
        with pytest.raises(ResourceNotFoundError):
            desk.bound.send(create_run("fresh", CONFIG, name))
        with pytest.raises(ResourceNotFoundError):
            desk.bound.send(sampling_pb2.CreateSamplerRequest(path=name))


@pytest.mark.parametrize("dp", [None, DPConfig(dataset_id="oncology-2026")])
def test_a_report_on_a_run_outside_names_neither_its_dataset_nor_its_privacy(desk: Desk, dp: DPConfig | None) -> None:
    outside = desk.owner.create(CONFIG.model_copy(update={"dp_config": dp})).run_id
    for asked in (outside, "run_" + "0" * 24):
        with pytest.raises(ResourceNotFoundError) as refused:
            desk.bound.send(privacy_pb2.GetPrivacyReportRequest(dataset_id=asked))
        assert refused.value.details["resource_id"] == asked
        assert "oncology" not in str(vars(refused.value))


def by_path(*paths: str) -> Iterator[Message]:
    for path in paths:
        yield artifacts_pb2.GetArtifactRequest(artifact_id=path)
        yield artifacts_pb2.PullArtifactRequest(artifact_id=path)
        yield artifacts_pb2.DeleteArtifactRequest(artifact_id=path)
        yield artifacts_pb2.SetArtifactTTLRequest(artifact_id=path)
        yield runs_pb2.CreateTrainingClientRequest(like=path)


def test_every_method_is_judged(desk: Desk) -> None:
    """Methods without an id, one by one: refused, or bound in a test of their own here."""
    harmless = {"GetCapabilities", "GetTokenizer", "CreateCustomLoss", "GetCheckpoint", "NoteFederation"}
    listed = {"ListTrainingClients", "ListArtifacts", "ListDatasets"}
    refused = {"CreateDataset", "ImportArtifact", "ImportWeights", "GetLogEntries", "GetAuditLog"}
    assert harmless | listed | refused == WITHOUT_IDS
    covered = {m.name for m in methods()} - WITHOUT_IDS
    assert covered == {method_of(type(r)).name for r in requests_on("r", "a", "d", "u")}
    for request in (
        datasets_pb2.CreateDatasetRequest(upload_id="u", dataset_id="people", privacy_unit="datum", num_records=1),
        privacy_pb2.GetLogEntriesRequest(start=0, count=1),
    ):
        with pytest.raises(AuthorizationError, match="policy"):
            desk.bound.send(request)
    with pytest.raises(ResourceNotFoundError):
        desk.bound.send(privacy_pb2.GetAuditLogRequest())
    run_id, _ = desk.trained(CONFIG)
    with pytest.raises(ResourceNotFoundError):
        desk.bound.send(privacy_pb2.GetAuditLogRequest(run_id=run_id))


def test_an_import_is_refused_before_a_byte_of_it(desk: Desk) -> None:
    with pytest.raises(AuthorizationError, match="policy"):
        send_stream(desk.bound, [artifacts_pb2.ImportArtifactRequest(signer=desk_signer(desk))])


def desk_signer(desk: Desk) -> str:
    state = desk.owner.send(privacy_pb2.GetCheckpointRequest())
    return state.log.verifier_key if hasattr(state, "log") else state.states[0].verifier_key


def send_stream(client: RawClient, requests: list[Any]) -> Any:
    import grpc

    from tests.server.rpc.raw_client import as_error

    method = method_of(type(requests[0]))
    data = iter([r.SerializeToString() for r in requests])
    try:
        return client.channel.stream_unary(method.path)(data, metadata=client.metadata, timeout=30)
    except grpc.RpcError as e:
        raise as_error(e) from e


def test_a_bound_key_trains_saves_and_goes_on_within_its_dataset(desk: Desk) -> None:
    run = desk.bound.send(create_run("one", CONFIG, None))
    dp = config_from_json(run.config_json).dp_config
    assert dp is not None
    assert (dp.dataset_id, dp.noise_multiplier, dp.target_epsilon) == ("people", 1.5, 8.0)
    assert desk.bound.call(run.run_id, 1, batch()).status == "completed"
    stepped: Any = desk.bound.call(run.run_id, 2, Step()).result
    assert stepped.dp_metrics.noise_applied
    assert desk.bound.call(run.run_id, 3, batch()).status == "completed"
    assert desk.bound.call(run.run_id, 4, Step(apply_dp_noise=False)).status == "failed"
    saved: Any = desk.bound.call(run.run_id, 5, Save(name="mid")).result
    again = desk.bound.send(runs_pb2.CreateTrainingClientRequest(request_id="two", like=saved.path, optimizer=True))
    assert config_from_json(again.config_json).dp_config == dp
    assert again.step == 1
    assert again.privacy.epsilon_spent == pytest.approx(stepped.dp_metrics.total_epsilon)
    listed = desk.bound.send(runs_pb2.ListTrainingClientsRequest())
    assert [r.run_id for r in listed.runs] == [again.run_id, run.run_id]
    assert listed.total == 2
    assert [a.artifact_id for a in desk.bound.send(artifacts_pb2.ListArtifactsRequest()).artifacts] == [
        saved.artifact_id
    ]
    assert desk.bound.send(sampling_pb2.CreateSamplerRequest(path=saved.path)).sampler_id
    assert desk.bound.send(sampling_pb2.CreateSamplerRequest(base_model="bigram")).sampler_id
    assert desk.bound.send(privacy_pb2.GetLedgerRequest(dataset_id="people")).entries_json
    # A run that another key of the tenant made under the same terms is its own as well.
    other, _ = desk.trained(POLICY.apply(CONFIG))
    assert desk.bound.send(runs_pb2.GetTrainingClientRequest(run_id=other)).run_id == other


def test_a_looser_run_cannot_be_created(desk: Desk) -> None:
    for policy, settings in LOOSER.values():
        config = asking(**settings)
        for text in (config_to_json(config), config_to_json(config, as_asked=True)):
            if policy is POLICY:
                with pytest.raises(InvalidRequestError):
                    desk.bound.send(runs_pb2.CreateTrainingClientRequest(request_id="loose", config_json=text))
    assert desk.owner.send(runs_pb2.ListTrainingClientsRequest()).runs == []


def test_fresh_names_for_the_same_people_are_not_counted_as_others(bigram_server: EmbeddedServer) -> None:
    counted = POLICY.model_copy(update={"sampling": "max_participation", "max_participation": 1})
    trusted = counted.model_copy(update={"unit_of": "ids"})
    same = batch()
    for policy, statuses in ((counted, ["failed", "failed"]), (trusted, ["completed", "completed"])):
        server_key = bigram_server.mint_key(policy.unit_of, EVERY_ROLE, policy=policy)
        client = RawClient(bigram_server.address, server_key)
        run = client.send(create_run("one", CONFIG, None))
        got = [
            client.call(run.run_id, seq, replace(same, units=tuple(f"{seq}-{n}" for n in range(4)))).status
            for seq in (1, 2)
        ]
        assert got == statuses
    # Known by content, the same records have no second turn.
    client = RawClient(bigram_server.address, bigram_server.mint_key("plain", EVERY_ROLE, policy=counted))
    run = client.send(create_run("one", CONFIG, None))
    outcomes = [client.call(run.run_id, seq, same if seq % 2 else Step()).status for seq in (1, 2, 3, 4)]
    assert outcomes == ["completed", "completed", "completed", "failed"]


def an_answer(sampled: int, **inputs: Any) -> Datum:
    """To the prompt 5, 6, 7."""
    given: dict[str, Any] = {
        "target_tokens": [6, 7, sampled],
        "logprobs": [0.0, 0.0, -2.0],
        "advantages": [0.0, 0.0, 1.0],
    }
    return Datum(ModelInput.from_ints([5, 6, 7]), {**given, **inputs})


def a_text(*tokens: int, weight: float = 1.0) -> Datum:
    inputs: dict[str, Any] = {"target_tokens": list(tokens), "weights": [weight] * len(tokens)}
    return Datum(ModelInput.from_ints(tokens), inputs)


def test_a_policy_names_the_units_of_datums_natively_too(bigram_server: EmbeddedServer) -> None:
    """As a group of eight: named by its caller it would be eight units, and move the sum by 8C."""
    by_prompt = POLICY.model_copy(
        update={"unit_of": "prompt", "privacy_unit": "group", "diagnostics": "owner", "max_grad_norm": 0.01}
    )
    client = RawClient(bigram_server.address, bigram_server.mint_key("rl", EVERY_ROLE, policy=by_prompt))
    run = client.send(create_run("one", CONFIG, None))
    call = LossPass(data=tuple(an_answer(20 + i) for i in range(8)), loss=Loss.of("importance_sampling"))
    refused = client.call(run.run_id, 1, replace(call, units=tuple("abcdefgh"))).error
    assert "not the caller's to say" in str(refused)
    assert "datums" in str(client.call(run.run_id, 2, batch()).error)
    assert client.call(run.run_id, 3, Step()).status == "failed", "the batch was incomplete"
    assert client.call(run.run_id, 4, call).status == "completed"
    stepped: Any = client.call(run.run_id, 5, Step()).result
    assert stepped.dp_metrics.num_clipped == 1, "eight answers are one unit"


def test_a_loss_over_the_batch_is_found_natively_too_and_attested_by_the_policy_alone(
    bigram_server: EmbeddedServer,
) -> None:
    seen, derived = (a_text(1, 2, weight=0.0), a_text(3, 4, weight=0.0)), (a_text(1, 2, weight=0.5), a_text(3, 4))
    cross_entropy = Loss.of("cross_entropy")
    for custom, status in (("refuse", "failed"), ("independent", "completed")):
        rule = POLICY.model_copy(update={"custom_loss": custom})
        client = RawClient(bigram_server.address, bigram_server.mint_key(custom, EVERY_ROLE, policy=rule))
        run = client.send(create_run("one", CONFIG, None))
        forward = LossPass(data=seen, loss=cross_entropy, train=False)
        assert client.call(run.run_id, 1, forward).status == "completed"
        assert client.call(run.run_id, 2, LossPass(data=derived, loss=cross_entropy)).status == status
    # Nobody attests for an owner of its own data, who computes unit by unit.
    owner = RawClient(bigram_server.address, bigram_server.mint_key("owner", EVERY_ROLE))
    run = owner.create(POLICY.apply(CONFIG))
    assert owner.call(run.run_id, 1, forward).status == "completed"
    assert owner.call(run.run_id, 2, LossPass(data=derived, loss=cross_entropy)).status == "completed"


def test_what_was_seen_before_a_restart_is_not_forgotten_in_silence(tmp_path: Path) -> None:
    from tg_tinker_server.config import ServerConfig

    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")
    uneven_inputs: dict[str, Any] = {"target_tokens": [2, 3], "weights": [0.25, 0.5]}
    uneven = Datum(ModelInput.from_ints([1, 2]), uneven_inputs)
    call = LossPass(data=(uneven, a_text(3, 4)), loss=Loss.of("cross_entropy"))
    with EmbeddedServer(config) as server:
        key = server.mint_key("acme", EVERY_ROLE, policy=POLICY)
        run = RawClient(server.address, key).send(create_run("one", CONFIG, None)).run_id
    with EmbeddedServer(config) as server:
        client = RawClient(server.address, key)
        assert "restart" in str(client.call(run, 1, call).error)
        assert client.call(run, 2, Step()).status == "failed"
        assert [client.call(run, seq, c).status for seq, c in ((3, call), (4, Step()))] == ["completed"] * 2


def test_a_request_id_of_another_key_opens_no_door(desk: Desk) -> None:
    """A run that exists under the id is found only if the policy would have made it."""
    desk.owner.create(CONFIG, request_id="shared")
    with pytest.raises(ResourceNotFoundError):
        desk.bound.send(create_run("shared", CONFIG, None))


def test_a_bound_key_stays_bound_after_a_restart(tmp_path: Path) -> None:
    from tg_tinker_server.config import ServerConfig

    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")
    with EmbeddedServer(config) as server:
        desk = Desk(server)
        outside, _ = desk.trained(CONFIG)
        inside, _ = desk.trained(POLICY.apply(CONFIG))
        key = server.mint_key("acme", EVERY_ROLE, policy=POLICY)
    with EmbeddedServer(config) as server:
        bound = RawClient(server.address, key)
        with pytest.raises(ResourceNotFoundError):
            bound.send(runs_pb2.GetTrainingClientRequest(run_id=outside))
        with pytest.raises(ResourceNotFoundError):  # asked for before anybody brought it back into memory
            bound.send(runs_pb2.UnloadModelRequest(run_id=outside))
        assert bound.send(runs_pb2.GetTrainingClientRequest(run_id=inside)).run_id == inside
