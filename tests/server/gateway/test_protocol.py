"""The rules of the Tinker protocol, over plain HTTP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.server.gateway.conftest import MODEL, Raw, cross_entropy, datum
from tg_tinker import ServiceClient
from tg_tinker.proto.v1 import gateway_pb2 as pb
from tg_tinker.types import LoRAConfig, WeightsSource
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.service.policy import KeyPolicy


def test_a_model_is_trained_and_every_result_has_the_form_that_clients_read(client: Raw) -> None:
    model = client.create()
    trained = client.outputs(client.train(model, 1, [1, 2, 3], [4, 5, 6, 7]))
    assert trained.metrics["loss:sum"] > 0
    assert all(key.count(":") == 1 for key in trained.metrics)
    (record,) = trained.loss_fn_outputs
    assert record.num_datums == 2
    logprobs = np.frombuffer(record.fields["logprobs"].data, "<f4")
    offsets = np.frombuffer(record.fields["logprobs"].offsets, "<i8")
    assert offsets.tolist() == [0, 8, 20]
    assert np.isclose(-logprobs.sum(), trained.metrics["loss:sum"], rtol=1e-5)
    stepped = client.retrieve(client.step(model, 2))
    assert stepped["metrics"]["unclipped_grad_norm"] > 0
    again = client.outputs(client.train(model, 3, [1, 2, 3], [4, 5, 6, 7], forward_only=True))
    assert again.metrics["loss:sum"] < trained.metrics["loss:sum"]


def test_chunks_out_of_order_and_a_pipeline_run_in_the_order_of_their_numbers(client: Raw) -> None:
    straight, shuffled = client.create(0), client.create(1)
    plan = [("train", [1, 2, 3]), ("train", [4, 5, 6, 7]), ("step", []), ("train", [1, 2, 3]), ("step", [])]

    def send(model: str, seq: int) -> str:
        kind, row = plan[seq - 1]
        return client.train(model, seq, row) if kind == "train" else client.step(model, seq)

    first = [client.retrieve(r, proto=True) for r in [send(straight, n) for n in (1, 2, 3, 4, 5)]]
    sent = {n: send(shuffled, n) for n in (3, 2, 5, 1, 4)}
    second = [client.retrieve(sent[n], proto=True) for n in (1, 2, 3, 4, 5)]
    losses = [pb.ForwardBackwardOutput.FromString(a[3]).metrics["loss:sum"] for a in (first, second)]
    assert losses[0] == losses[1]


def test_a_repeated_request_is_executed_once_and_a_changed_one_is_refused_under_its_own_id(client: Raw) -> None:
    model = client.create()
    ids = {client.train(model, 1, [1, 2, 3]) for _ in range(3)}
    steps = {client.step(model, 2) for _ in range(3)}
    assert len(ids) == len(steps) == 1
    assert client.retrieve(steps.pop()) == client.retrieve(client.step(model, 2))
    changed = client.train(model, 1, [1, 2, 4])
    assert changed not in ids
    refused = client.retrieve(changed)
    assert refused["category"] == "user"
    assert "different request" in refused["error"]
    assert isinstance(client.retrieve(ids.pop(), proto=True), bytes)  # still there, and again


def test_a_gap_is_given_up_the_batch_is_refused_once_and_the_client_goes_on(client: Raw) -> None:
    model = client.create()
    client.train(model, 1, [1, 2, 3])
    later = client.train(model, 3, [1, 2, 3])  # 2 never comes
    step = client.step(model, 4)
    assert isinstance(client.retrieve(later, proto=True), bytes)
    refused = client.retrieve(step)
    assert refused["category"] == "user"
    assert "did not arrive" in refused["error"]
    late = client.retrieve(client.train(model, 2, [7, 8, 9]))
    assert "given up" in late["error"]
    client.train(model, 5, [1, 2, 3])
    assert client.retrieve(client.step(model, 6))["metrics"]


def test_whatever_can_be_read_is_accepted_and_fails_in_its_future(client: Raw) -> None:
    model = client.create()
    image = cross_entropy(model, 3)
    image.data[0].model_input.add().image.format = "png"
    bad = {
        "empty": pb.ForwardBackwardRequest(model_id=model, seq_id=1, loss_fn="cross_entropy"),
        "vocabulary": cross_entropy(model, 2, [1, 2**20, 3]),
        "text models only": image,
        "stable_reinforce": pb.ForwardBackwardRequest(
            model_id=model, seq_id=4, loss_fn="stable_reinforce", data=cross_entropy(model, 4).data
        ),
        "weights": pb.ForwardBackwardRequest(
            model_id=model, seq_id=5, loss_fn="cross_entropy", data=[datum([1, 2], [2, 3])]
        ),
        "values": pb.ForwardBackwardRequest(
            model_id=model,
            seq_id=6,
            loss_fn="cross_entropy",
            data=[datum([1, 2], [2, 3], weights=pb.Tensor(dense=b"12345678", dtype=pb.DTYPE_FLOAT32, shape=[3]))],
        ),
    }
    for text, request in bad.items():
        response = client.forward_backward(request)
        assert response.status_code == 200, response.text
        answer = client.retrieve(response.json()["request_id"])
        assert answer["category"] == "user"
        assert text in answer["error"], answer
    for name in ("../x", "a/b", "..", "", "x" * 129):
        seq = 7 + ["../x", "a/b", "..", "", "x" * 129].index(name)
        answer = client.retrieve(client.submit("save_weights", model, seq, path=name))
        assert answer["category"] == "user"
    assert client.retrieve(client.step(model, 12))["category"] == "user"  # nothing of this batch counts
    client.train(model, 13, [1, 2, 3])
    assert client.retrieve(client.step(model, 14))["metrics"]


def test_creating_again_finds_the_same_model_and_another_configuration_is_refused(client: Raw) -> None:
    model = client.create(5)
    assert client.create(5) == model
    body = {"session_id": client.session, "model_seq_id": 5, "base_model": MODEL, "lora_config": {"rank": 8}}
    refused = client.retrieve(client.ok("create_model", body)["request_id"])
    assert "another request" in refused["error"]
    info = client.ok("get_info", {"model_id": model})
    assert (info["model_name"], info["lora_rank"], info["is_lora"]) == (MODEL, 4, True)


def test_weights_are_saved_loaded_and_shown(client: Raw) -> None:
    model = client.create()
    client.train(model, 1, [1, 2, 3])
    client.step(model, 2)
    saved = client.retrieve(client.submit("save_weights", model, 3, path="a"))
    assert saved["path"] == f"tinker://{model}/weights/a"
    again = client.retrieve(client.submit("save_weights", model, 4, path="a"))
    assert again["category"] == "user"
    over = client.retrieve(client.submit("save_weights", model, 5, path="a", overwrite=True))
    assert over["path"] == saved["path"]
    info = client.ok("weights_info", {"tinker_path": saved["path"]})
    assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == (MODEL, 4, True)
    body = {"session_id": client.session, "model_seq_id": 1, "path": saved["path"], "optimizer": True}
    loaded = client.retrieve(client.ok("load_weights", body)["request_id"])
    assert loaded["model_id"] == f"{client.session}:train:1"
    here = client.outputs(client.train(model, 6, [1, 2, 3], forward_only=True))
    there = client.outputs(client.train(loaded["model_id"], 1, [1, 2, 3], forward_only=True))
    assert here.metrics["loss:sum"] == there.metrics["loss:sum"]
    legacy = {"path": saved["path"], "optimizer": False}
    assert client.retrieve(client.submit("load_weights", model, 7, **legacy))["type"] == "load_weights"


def test_privacy_asked_of_weights_that_were_trained_without_is_refused_and_never_ignored(client: Raw) -> None:
    model = client.create()
    path = client.retrieve(client.submit("save_weights", model, 1, path="a"))["path"]
    asked = {"session_id": client.session, "path": path, "optimizer": False}
    for n, private in enumerate(
        (
            {"optimizer_config": {"type": "dp_adamw", "target_epsilon": 4.0}},
            {"optimizer_config": {"type": "adamw", "target_epsilon": 4.0}},
            {"base_model": f"{MODEL}:dp-eps4"},
        )
    ):
        refused = client.retrieve(
            client.ok("load_weights", {**asked, "model_seq_id": 10 + n, **private})["request_id"]
        )
        assert refused.get("category") == "user", refused
    plain = {**asked, "model_seq_id": 20, "optimizer_config": {"type": "adamw"}}
    assert client.retrieve(client.ok("load_weights", plain)["request_id"])["model_id"]


def test_checkpoints_of_a_deleted_run_are_listed_described_and_go_on(server: EmbeddedServer, client: Raw) -> None:
    kept, gone = client.create(), client.create(1, base_model=f"{MODEL}:dp-eps8-noise1.0")
    paths = [client.retrieve(client.submit("save_weights", m, 1, path="a"))["path"] for m in (kept, gone)]
    before = client.call("GET", "checkpoints").json()
    with ServiceClient(client.key, server.address) as service:
        service.delete_training_client(service.list_training_clients()[0].id)
    assert client.call("GET", f"training_runs/{gone}").status_code == 404
    assert client.call("GET", "checkpoints").json() == before
    assert set(paths) <= {c["tinker_path"] for c in before["checkpoints"]}
    assert client.ok("weights_info", {"tinker_path": paths[1]}) == client.ok(
        "weights_info", {"tinker_path": paths[0]}
    )
    body = {"session_id": client.session, "model_seq_id": 2, "path": paths[1]}
    body["optimizer_config"] = {"type": "dp_adamw"}
    assert client.retrieve(client.ok("load_weights", body)["request_id"]).get("model_id")


def test_what_came_from_elsewhere_has_no_address_and_stops_no_list(server: EmbeddedServer, client: Raw) -> None:
    source = WeightsSource(job="ab" * 32, round=1, epsilon=1.0, delta=1e-5)
    with ServiceClient(client.key, server.address) as service:
        brought = service.import_weights(
            {"table": np.zeros((260, 260), np.float32)},
            base_model=MODEL,
            lora_config=LoRAConfig(),
            source=source,
        )
    path = client.retrieve(client.submit("save_weights", client.create(), 1, path="a"))["path"]
    listed = client.call("GET", "checkpoints")
    assert listed.status_code == 200, listed.text
    assert listed.json()["checkpoints"][0]["tinker_path"] == path
    assert brought.artifact_id not in listed.text
    refused = client.post("weights_info", {"tinker_path": f"tg://imported/weights/{brought.artifact_id}"})
    assert refused.status_code == 400
    assert "elsewhere" in refused.json()["detail"]


def test_old_clients_send_and_get_json(client: Raw) -> None:
    model = client.create()
    sent = {
        "data": [
            {
                "model_input": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
                "loss_fn_inputs": {
                    "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
                    "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
                },
            }
        ],
        "loss_fn": "cross_entropy",
        "loss_fn_config": None,
    }
    result = client.retrieve(client.submit("forward_backward", model, 1, forward_backward_input=sent))
    proto = client.outputs(client.train(model, 2, [1, 2, 3, 4], forward_only=True))
    assert result["metrics"]["loss:sum"] == proto.metrics["loss:sum"]
    assert len(result["loss_fn_outputs"][0]["logprobs"]["data"]) == 3


def test_what_is_not_there_and_what_is_anothers_get_the_same_answer(client: Raw, server: EmbeddedServer) -> None:
    model = client.create()
    future = client.train(model, 1, [1, 2, 3])
    client.retrieve(future, proto=True)
    sampler = client.ok(
        "create_sampling_session",
        {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": MODEL},
    )["sampling_session_id"]
    other = Raw(client.url, server.mint_key("other")).open()
    missing = "0" * 32
    for path, body in {
        "get_info": {"model_id": "{}:train:0"},
        "retrieve_future": {"request_id": "{}:train:0:op:1"},
        "optim_step": {"model_id": "{}:train:0", "seq_id": 2, "adam_params": {}},
        "session_heartbeat": {"session_id": "{}"},
        "create_model": {"session_id": "{}", "model_seq_id": 1, "base_model": MODEL},
        "asample": {"sampling_session_id": "{}:sample:0", "seq_id": 0, "prompt": {"chunks": []}},
    }.items():
        answers = []
        for session in (client.session, missing):
            filled = {k: v.format(session) if isinstance(v, str) else v for k, v in body.items()}
            response = other.post(path, filled)
            assert response.status_code == 404, (path, response.text)
            answers.append(response.content)
        assert answers[0] == answers[1], path
    for path in ("sessions/{}", "training_runs/{}:train:0", "samplers/{}:sample:0"):
        answers = [other.call("GET", path.format(s)) for s in (client.session, missing)]
        assert [a.status_code for a in answers] == [404, 404]
        assert answers[0].content == answers[1].content
    assert client.call("GET", f"samplers/{sampler}").json()["base_model"] == MODEL


def test_a_key_with_a_policy_reads_only_why_its_own_models_could_not_be_made(
    client: Raw, server: EmbeddedServer
) -> None:
    policy = KeyPolicy(dataset_id="d", target_epsilon=8.0, target_delta=1e-6, noise_multiplier=2.0)
    bound, unbound = (Raw(server.tinker_url, server.mint_key(policy=p)).open() for p in (policy, None))
    failed = []
    for raw in (client, bound):
        body = {"session_id": raw.session, "model_seq_id": 7, "base_model": f"secret-{raw.session}"}
        failed.append(raw.ok("create_model", body)["request_id"])
        assert raw.session in raw.retrieve(failed[-1])["error"]
    assert client.session in unbound.retrieve(failed[0])["error"]
    for path, field, end in (("retrieve_future", "request_id", ":create"), ("get_info", "model_id", "")):
        answers = [bound.post(path, {field: f"{client.session}:train:{n}{end}"}) for n in (7, 8)]
        assert [a.status_code for a in answers] == [404, 404]
        assert answers[0].content == answers[1].content


def test_refusals_are_kept_without_the_bodies_that_were_refused(server: EmbeddedServer, client: Raw) -> None:
    model = client.create()
    client.train(model, 1, [1, 2, 3])
    assert "different request" in client.retrieve(client.train(model, 1, [1, 2, 4]))["error"]
    nothing = {"session_id": client.session, "base_model": "nothing", "model_seq_id": 7}
    for _ in range(2):
        assert "nothing" in client.retrieve(client.ok("create_model", nothing)["request_id"])["error"]
        answer = client.post("optim_step", {"model_id": f"{client.session}:train:7", "seq_id": 1})
        assert "nothing" in client.retrieve(answer.json()["request_id"])["error"]
    gateway: Any = server._server._gateway  # type: ignore[union-attr]
    making = gateway._models._making[("default", f"{client.session}:train:7")]
    kept = [making.task.exception(), *gateway._futures._refused.values()]
    assert len(kept) >= 4
    assert not any(e.__traceback__ or e.__context__ or e.__cause__ for e in kept)


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "x" * 201},
        {"path": 7},
        {"path": "x", "ttl_seconds": -1},
        {"path": "x", "user_metadata": []},
        {"path": "x", "age_encryption_recipients": ["no"] * 65},
    ],
)
def test_a_request_that_cannot_be_done_fails_in_its_turn_and_takes_its_number_along(
    client: Raw, wrong: dict[str, Any]
) -> None:
    model = client.create()
    trained = client.train(model, 1, [1, 2, 3])
    saved = client.submit("save_weights", model, 2, **wrong)
    assert saved == f"{model}:op:2"
    stepped = client.step(model, 3)
    assert client.retrieve(saved)["category"] == "user"
    assert isinstance(client.retrieve(trained, proto=True), bytes)
    assert client.retrieve(stepped)["metrics"]["unclipped_grad_norm"] > 0
