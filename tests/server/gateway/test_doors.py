"""Who is let in, what a body may be, and that nothing sent from outside is our fault."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard

from tests.server.gateway.conftest import MODEL, Raw, config, cross_entropy
from tg_tinker import ServiceClient
from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.gateway import requests
from tg_tinker_server.gateway.doors import SCOPES, Doors
from tg_tinker_server.service.policy import KeyPolicy
from tg_tinker_server.store import tables as t

PARTS = {"session": "0" * 32, "model": "x", "kind": "weights", "name": "n", "sampler": "s", "token": "t", "file": "f"}


def _open(name: str) -> tuple[str, str]:
    method, _, path = name.partition(" ")
    return method, path.format(**PARTS)


def test_a_route_without_a_scope_and_a_scope_without_a_route_stop_the_start() -> None:
    async def handler(_call: Any) -> Any: ...

    doors = Doors(None, None, 1, False)  # type: ignore[arg-type]
    assert len(doors.routes(dict.fromkeys(SCOPES, handler))) == len(SCOPES)
    with pytest.raises(RuntimeError, match="POST surprise"):
        doors.routes({**dict.fromkeys(SCOPES, handler), "POST surprise": handler})
    with pytest.raises(RuntimeError, match="GET audit"):
        doors.routes({name: handler for name in SCOPES if name != "GET audit"})


@pytest.mark.parametrize("name", [n for n, scope in SCOPES.items() if scope != "PUBLIC"])
def test_every_route_wants_a_key(server: EmbeddedServer, client: Raw, name: str) -> None:
    method, path = _open(name)
    url = f"{server.tinker_url}/api/v1/{path}"
    wrong = client.key[:-9] + ("0" if client.key[-9] != "0" else "1") + client.key[-8:]
    for key in ("", client.key, "tml-" + wrong, "eyJhbGciOiJIUzI1NiJ9.e30.x"):
        response = client.http.request(method, url, headers={"X-API-Key": key}, json={})
        assert response.status_code == 401, (name, key)
        assert client.key not in response.text


def test_a_key_does_only_what_its_roles_allow(server: EmbeddedServer) -> None:
    auditor = Raw(server.tinker_url, server.mint_key(roles=("auditor",)))
    sampler = Raw(server.tinker_url, server.mint_key(roles=("sampler",)))
    for name, scope in SCOPES.items():
        method, path = _open(name)
        for raw, scopes in ((auditor, ("READ", "AUDIT")), (sampler, ("READ", "SAMPLE"))):
            status = raw.call(method, path, {}).status_code
            assert (status == 403) == (scope not in (*scopes, "PUBLIC")), (name, status)


def test_who_may_only_read_changes_nothing(server: EmbeddedServer, client: Raw) -> None:
    auditor = Raw(server.tinker_url, server.mint_key(roles=("auditor",)))
    exporter = Raw(server.tinker_url, server.mint_key(roles=("exporter",)))
    model = client.create()
    request = client.submit("save_weights_for_sampler", model, 1, sampling_session_seq_id=5)
    plain = client.submit("save_weights", model, 2, path="a")
    client.retrieve(plain)
    for forged in (request.replace(":sampler:5:", ":sampler:6:"), f"{plain}:sampler:7:{'0' * 24}"):
        assert auditor.post("retrieve_future", {"request_id": forged}).status_code == 404
    assert client.retrieve(request)["sampling_session_id"] == f"{client.session}:sample:5"
    for n in (6, 7):
        assert client.call("GET", f"samplers/{client.session}:sample:{n}").status_code == 404
    external = {"model_id": model, "seq_id": 3, "path": "out"}
    assert exporter.post("save_weights_external", external).status_code == 403
    finish = f"sessions/{client.session}/finish"
    assert auditor.post(finish, {}).status_code == 403
    assert client.post("session_heartbeat", {"session_id": client.session}).status_code == 200
    own = auditor.open()
    assert own.post(f"sessions/{own.session}/finish", {}).status_code == 204


def test_a_key_with_a_policy_reads_the_audit_log_of_its_own_runs(server: EmbeddedServer, client: Raw) -> None:
    policy = KeyPolicy(dataset_id="audited", target_epsilon=8.0, target_delta=1e-6, noise_multiplier=2.0)
    bound = Raw(server.tinker_url, server.mint_key(roles=("trainer", "auditor"), policy=policy)).open()
    models = [raw.create() for raw in (client, bound)]
    for raw, model in zip((client, bound), models, strict=True):
        raw.retrieve(raw.submit("save_weights", model, 1, path="a"))
    mine = f"tinker/{models[1]}"
    runs = server._foundation.db.read(lambda tx: {r.request_id: r.run_id for r in tx.execute(t.runs.select())})
    for _ in range(3000):
        entries = bound.call("GET", "audit").json()["entries"]
        if entries:
            break
        time.sleep(0.02)
    assert {e["model_id"] for e in entries} == {runs[mine]}
    with ServiceClient(server.mint_key(), server.address) as service:
        for run_id in runs.values():
            service.delete_training_client(run_id)
    after = bound.call("GET", "audit").json()["entries"]
    assert {e["model_id"] for e in after} == {runs[mine]}  # what was done stays done


def test_a_revoked_key_ends(server: EmbeddedServer) -> None:
    raw = Raw(server.tinker_url, server.mint_key())
    raw.ok("client/config", {})
    server.revoke_key(raw.key)
    for _ in range(1200):
        if raw.post("client/config", {}).status_code == 401:
            return
        time.sleep(0.05)
    raise AssertionError("it still works")


def test_no_body_whatsoever_is_an_error_of_the_server(client: Raw) -> None:
    model = client.create()
    good = cross_entropy(model, 1).SerializeToString()
    dice = random.Random(7)
    bodies: list[Any] = [None, [], 7, "x", {"request_id": 5}, {"session_id": None}, {"model_id": model, "seq_id": 0}]
    bodies += [{"model_id": model, "seq_id": s} for s in (-1, 2**70, 1.5, "1", True, None, [1])]
    bodies += [
        {"session_id": client.session, "model_seq_id": 9, "base_model": MODEL, "lora_config": c} for c in (7, [])
    ]
    deep = [
        b'{"session_id":"' + client.session.encode() + b'","user_metadata":' + b'{"a":' * n for n in (300, 990, 9000)
    ]
    deep = [d + b"1" + b"}" * (d.count(b"{")) for d in deep]
    for name in SCOPES:
        method, path = _open(name)
        for body in bodies:
            response = client.call(method, path, body)
            assert response.status_code < 500, (name, response.text)
        for data in deep:
            response = client.call(method, path, content=data, headers={"Content-Type": "application/json"})
            assert response.status_code < 500, (name, len(data))
        for _ in range(4):
            noise = dice.randbytes(dice.randrange(1, 60))
            kind = dice.choice(["application/json", "application/x-protobuf", "text/plain"])
            response = client.call(method, path, content=noise, headers={"Content-Type": kind})
            assert response.status_code < 500, (name, noise)
    for _ in range(60):  # nearly right
        broken = bytearray(good)
        for _ in range(dice.randrange(1, 4)):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        headers = {"Content-Type": "application/x-protobuf"}
        response = client.post("forward_backward", content=bytes(broken[: dice.randrange(1, 400)]), headers=headers)
        assert response.status_code < 500, broken


def test_sampling_options_of_any_type_are_never_our_fault(client: Raw) -> None:
    body = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = client.ok("create_sampling_session", body)["sampling_session_id"]
    prompt = {"chunks": [{"tokens": [1], "type": "encoded_text"}]}
    strange: list[Any] = [None, -1, 2**80, 10**400, "x", [], {}, [[]], [None], True, 1.5, "", [""], [2**40]]
    seq = 0
    for place in ("max_tokens", "seed", "stop", "temperature", "top_k", "top_p"):
        for value in strange:
            if (place, value) == ("max_tokens", None):
                continue  # as many as fit, which takes a while
            sent = {"max_tokens": 2, place: value}
            seq += 1
            asked = {"sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "sampling_params": sent}
            response = client.post("asample", asked)
            assert response.status_code < 500, (place, value, response.text)
            if response.status_code == 200:
                answer = client.retrieve(response.json()["request_id"], proto=True)
                assert isinstance(answer, bytes) or answer["category"] == "user"
    for place in (
        "num_samples",
        "prompt_logprobs_last_n",
        "topk_prompt_logprobs",
        "target_prompt_logprobs",
        "prompt",
    ):
        for value in strange:
            seq += 1
            asked = {"sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, place: value}
            asked["sampling_params"] = {"max_tokens": 1}
            assert client.post("asample", asked).status_code < 500, (place, value)


@pytest.mark.parametrize("day", ["9999-12-31", "0000-00-00", "x"])
def test_days_without_an_end_are_none(server: EmbeddedServer, day: str) -> None:
    auditor = Raw(server.tinker_url, server.mint_key(roles=("auditor",)))
    assert auditor.call("GET", f"audit?day={day}").status_code == 400


def test_a_large_body_is_read_beside_the_event_loop_and_a_huge_one_not_at_all(
    client: Raw, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = client.ok("create_sampling_session", body)["sampling_session_id"]
    parse, read_by = json.loads, []

    def watched(data: Any, *args: Any, **options: Any) -> Any:
        if len(data) > 2**16:
            read_by.append(threading.current_thread())
        return parse(data, *args, **options)

    monkeypatch.setattr("tg_tinker_server.gateway.requests.json.loads", watched)
    start = f'{{"sampling_session_id":"{sampler}","seq_id":0,"prompt":{{"chunks":['
    bodies = [
        (start + end).encode() for end in ("[]," * 1_300_000 + "[]]}}", "1," * 2_000_000 + "1]}}", "1," * 10**7)
    ]
    statuses = [client.post("asample", content=b).status_code for b in bodies]
    small = client.post("create_session", content=b'{"tags":["' + b"x" * 2**19 + b'"]}').status_code
    assert (statuses, small) == ([400, 200, 413], 413)  # 200: a failed sample
    assert read_by
    assert server._thread not in read_by


def test_telemetry_is_accepted_and_nothing_of_it_kept(client: Raw, server: EmbeddedServer) -> None:
    canary = "canary-in-a-traceback"
    assert client.ok("telemetry", {"events": [{"event": canary}]}) == {"status": "accepted"}
    assert client.post("telemetry", content=b"\xff" * 1000).status_code == 200
    kept = b"".join(p.read_bytes() for p in server._config.data_dir.glob("tg-tinker.db*"))
    assert canary.encode() not in kept


def test_a_body_that_is_too_large_is_refused_also_when_it_is_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, undo, undone_by = 2**16, requests.decompress, []

    def watched(data: bytes, most: int) -> bytes:
        undone_by.append(threading.current_thread())
        return undo(data, most)

    monkeypatch.setattr(requests, "decompress", watched)
    with EmbeddedServer(config(tmp_path, max_request_bytes=limit, tinker_zstd=True)) as server:
        client = Raw(server.tinker_url, server.mint_key()).open()
        flags = client.ok("client/config", {})
        assert flags["proto_compress_fwdbwd"] is True
        assert flags["fwdbwd_max_chunk_bytes_count"] == limit * 3 // 4
        model = client.create()
        good = cross_entropy(model, 1).SerializeToString()
        compressor = zstandard.ZstdCompressor()
        proto = {"Content-Type": "application/x-protobuf"}

        def send(data: bytes, encoding: str) -> httpx.Response:
            return client.post("forward_backward", content=data, headers={**proto, "Content-Encoding": encoding})

        stream = compressor.compressobj()
        answer = send(stream.compress(good) + stream.flush(), "zstd")
        assert client.outputs(answer.json()["request_id"]).metrics["loss:sum"] > 0
        assert send(compressor.compress(bytes(50 * 2**20)), "zstd").status_code == 413
        assert send(bytes(limit + 1), "identity").status_code == 413
        assert send(b"not zstd", "zstd").status_code == 400
        assert send(good, "gzip").status_code == 400
        assert len(undone_by) == 3
        assert {t.name.rpartition("_")[0] for t in undone_by} == {"zstd"}  # not the event loop's
        assert len(set(undone_by)) == 1  # one at a time: windows are large


def test_compression_that_was_not_offered_is_refused(client: Raw) -> None:
    data = zstandard.ZstdCompressor().compress(b"{}")
    response = client.post("forward_backward", content=data, headers={"Content-Encoding": "zstd"})
    assert response.status_code == 400
    assert "not offered" in response.json()["detail"]


def test_what_is_not_served_is_said_in_words(client: Raw, server: EmbeddedServer) -> None:
    answer = client.call("GET", "no/such/thing")
    assert answer.status_code == 400
    assert "not part of" in answer.json()["detail"]
    assert client.call("PUT", "create_model").status_code == 400
    assert client.call("GET", "healthz", headers={"X-API-Key": ""}).json() == {"status": "ok"}
    assert client.post("copy_weights", {"source_path": "tinker://a/weights/b"}).status_code == 400
    assert client.call("GET", "billing/usage/events").json()["data"] == []


def test_a_taken_port_and_files_that_are_no_certificate_are_told(tmp_path: Path, server: EmbeddedServer) -> None:
    port = int(server.tinker_url.rpartition(":")[2])
    taken = config(tmp_path / "a").model_copy(update={"tinker_port": port})
    with pytest.raises(InvalidRequestError, match="tinker_port"):
        EmbeddedServer(taken).start()


def test_the_audit_log_tells_what_was_done_through_this_door(client: Raw) -> None:
    model = client.create()
    client.train(model, 1, [1, 2, 3])
    client.retrieve(client.step(model, 2))
    client.retrieve(client.submit("save_weights", model, 3, path="a"))
    entries = client.call("GET", "audit").json()["entries"]
    mine = [e["event"] for e in entries if e["event_details"]["actor"] == client.key.split("_")[1]]
    assert mine[-3:] == ["forward_backward", "optim_step", "save_state"]
    kept = json.dumps(client.call("GET", "audit?event_type=checkpoints").json())
    assert "save_state" in kept
    assert "optim_step" not in kept
