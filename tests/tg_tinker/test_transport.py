import datetime
import ipaddress
import threading
import time
from concurrent import futures

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tg_tinker import (
    AuthenticationError,
    DPBudgetExceededError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    ServiceClient,
    TrainingConfig,
)
from tg_tinker._alarm import Alarm
from tg_tinker._endpoint import TlsFiles
from tg_tinker._transport import RetryPolicy, Transport
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker.types import ServiceConfig
from tg_tinker.wire import requests

ASK = requests.capabilities("1")


def transport_to(server, **policy):
    config = ServiceConfig(
        base_url=f"127.0.0.1:{server.port}", timeout=5.0, retry_count=3, tls=False, api_key="tgk_test_key"
    )
    return Transport(config, policy=RetryPolicy(**{"first_s": 0.01, "longest_s": 0.05, **policy}))


def test_a_reply_comes_back_as_a_message(server):
    assert transport_to(server).call(ASK).tenant_id == "clinic"


def test_every_call_says_who_calls_and_under_which_id(server):
    config = ServiceConfig(
        base_url=f"127.0.0.1:{server.port}",
        timeout=5.0,
        retry_count=0,
        tls=False,
        api_key="tgk_test_key",
        tenant_id="clinic",
    )
    Transport(config).call(ASK)
    seen = server.metadata_seen[-1]
    assert seen["authorization"] == "Bearer tgk_test_key"
    assert seen["x-tenant-id"] == "clinic"
    assert seen["x-client-version"]
    assert len(seen["x-request-id"]) == 32


def test_a_repeated_request_keeps_its_id_and_its_bytes(server):
    server.faults["GetCapabilities"] = [grpc.StatusCode.UNAVAILABLE] * 2
    transport_to(server).call(ASK)
    assert len({m["x-request-id"] for m in server.metadata_seen}) == 1
    assert len(server.seen("GetCapabilities")) == 3


def test_an_error_of_the_server_arrives_as_its_class_with_its_values(server):
    error = DPBudgetExceededError("over", current_epsilon=3.9, max_epsilon=4.0, delta=1e-5, request_id="r-1")
    server.faults["GetCapabilities"] = [error]
    with pytest.raises(DPBudgetExceededError) as caught:
        transport_to(server).call(ASK)
    assert (caught.value.current_epsilon, caught.value.max_epsilon, caught.value.delta) == (3.9, 4.0, 1e-5)
    assert caught.value.request_id == "r-1"
    assert caught.value.code == "DP_BUDGET_EXCEEDED"


def test_an_error_without_a_request_id_gets_the_one_we_sent(server):
    server.faults["GetCapabilities"] = [InvalidRequestError("no", field="f")]
    with pytest.raises(InvalidRequestError) as caught:
        transport_to(server).call(ASK)
    assert caught.value.request_id == server.metadata_seen[-1]["x-request-id"]


def test_too_many_requests_are_repeated_after_the_named_pause_and_then_raised(server):
    server.faults["GetCapabilities"] = [RateLimitedError("slow down", retry_after=0.1)] * 2
    started = time.monotonic()
    assert transport_to(server, retry_count=2).call(ASK).tenant_id == "clinic"
    assert time.monotonic() - started >= 0.2
    server.faults["GetCapabilities"] = [RateLimitedError("slow down", retry_after=0.05)] * 3
    with pytest.raises(RateLimitedError) as caught:
        transport_to(server, retry_count=2).call(ASK)
    assert caught.value.retry_after == 0.05


def test_without_retries_nothing_is_repeated(server):
    server.faults["GetCapabilities"] = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(ServerError, match="cannot reach"):
        transport_to(server, retry_count=0).call(ASK)
    assert len(server.seen("GetCapabilities")) == 1


def test_a_server_that_was_never_there_is_named_soon_with_what_to_do():
    config = ServiceConfig(base_url="127.0.0.1:9", timeout=300.0, retry_count=3, tls=False, api_key="tgk_x")
    transport = Transport(config, policy=RetryPolicy(first_s=0.01))
    started = time.monotonic()
    with pytest.raises(ServerError, match="tg-tinker serve") as caught:
        transport.call(ASK)
    assert "127.0.0.1:9" in caught.value.message
    assert time.monotonic() - started < 60.0


def test_a_server_that_starts_a_moment_later_is_found(server):
    server.stop()
    threading.Timer(0.3, server.start).start()
    assert transport_to(server, first_s=0.1, longest_s=1.0).call(ASK).tenant_id == "clinic"


def test_an_answer_that_does_not_come_is_asked_for_again(server):
    server.faults["GetCapabilities"] = [1.0]
    transport = transport_to(server, attempt_s=0.2)
    assert transport.call(ASK).tenant_id == "clinic"
    assert len(server.seen("GetCapabilities")) == 2


def test_without_a_key_nothing_is_sent_and_the_error_says_how_to_get_one(server, monkeypatch):
    monkeypatch.delenv("TG_TINKER_API_KEY")
    with ServiceClient() as service, pytest.raises(AuthenticationError, match="tg-tinker keys create"):
        service.create_training_client(TrainingConfig(model_ref="sum"))
    with ServiceClient(api_key="two\nlines") as service, pytest.raises(AuthenticationError, match="characters"):
        service.get_server_capabilities()
    assert server.requests == []


def test_a_wrong_key_is_an_authentication_error(server):
    with ServiceClient(api_key="tgk_wrong") as service, pytest.raises(AuthenticationError):
        service.get_server_capabilities()


def test_a_call_the_server_does_not_know_hints_at_versions():
    bare = grpc.server(futures.ThreadPoolExecutor(1))
    port = bare.add_insecure_port("127.0.0.1:0")
    bare.start()
    config = ServiceConfig(base_url=f"127.0.0.1:{port}", timeout=5, retry_count=0, tls=False, api_key="tgk_x")
    with pytest.raises(ServerError, match="versions differ"):
        Transport(config).call(ASK)
    bare.stop(0)


def test_a_message_larger_than_the_server_takes_names_the_limit(server):
    small = grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.max_receive_message_length", 100)])
    small.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("tg_tinker.v1.RunService", _get_run_only())])
    port = small.add_insecure_port("127.0.0.1:0")
    small.start()
    config = ServiceConfig(base_url=f"127.0.0.1:{port}", timeout=5, retry_count=0, tls=False, api_key="tgk_x")
    with pytest.raises(InvalidRequestError, match="split the batch"):
        Transport(config).call(requests.get_run("x" * 1000))
    small.stop(0)


def _get_run_only():
    handler = grpc.unary_unary_rpc_method_handler(
        lambda request, context: runs_pb2.RunInfo(),
        runs_pb2.GetTrainingClientRequest.FromString,
        lambda m: m.SerializeToString(),
    )
    return {"GetTrainingClient": handler}


def test_a_closed_client_refuses_and_wakes_whoever_waits(server):
    server.faults["GetCapabilities"] = [1.0, grpc.StatusCode.UNAVAILABLE]
    transport = transport_to(server, longest_s=60.0, first_s=60.0)
    under_way, _ = transport.send(ASK), time.sleep(0.1)
    pausing, _ = transport.send(ASK), time.sleep(0.1)
    transport.close()
    for call in (under_way, pausing, transport.send(ASK)):
        assert isinstance(call.exception(5), InvalidRequestError)
        assert "closed" in call.exception().message


def test_a_stream_begins_again_until_its_first_message_only(server):
    request = requests.sample_stream("run_1", "p", _params())
    server.faults["SampleStream"] = [grpc.StatusCode.UNAVAILABLE] * 2
    transport = transport_to(server)
    transport.call(ASK)
    assert [c.text for c in transport.stream(request)] == ["a", "b", "c"]
    server.gate.clear()
    stream = transport.stream(request)
    next(stream)
    server.stop()
    with pytest.raises(ServerError, match="cannot reach"):
        list(stream)
    server.start()


def test_closing_a_stream_cancels_it_at_the_server(server):
    stream = transport_to(server).stream(requests.sample_stream("run_1", "p", _params()))
    assert next(stream).text == "a"
    stream.close()
    assert list(stream) == []


def _params():
    from tg_tinker.types.sampling import GenerationOptions

    return GenerationOptions()


def test_alarms_ring_in_time_order_on_one_thread():
    alarm, rung, done = Alarm(), [], threading.Event()
    for name, delay in (("c", 0.15), ("a", 0.05), ("b", 0.1)):
        alarm.after(delay, lambda name=name: rung.append((name, threading.current_thread().name)))
    alarm.after(0.12, lambda: 1 / 0)  # a failing function does not stop the others
    alarm.after(0.2, done.set)
    assert done.wait(60)
    assert rung == [(n, "tg-tinker-alarm") for n in "abc"]
    alarm.after(60, lambda: rung.append("at close"))
    alarm.close()
    alarm.after(60, lambda: rung.append("after close"))
    deadline = time.monotonic() + 60
    while len(rung) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert set(rung[3:]) == {"at close", "after close"}


def test_pauses_grow_to_their_bound_and_are_spread():
    policy = RetryPolicy(first_s=0.1, longest_s=2.0)
    for repeats, bound in ((0, 0.1), (1, 0.2), (4, 1.6), (5, 2.0), (10_000, 2.0)):
        delays = [policy.delay_s(repeats) for _ in range(50)]
        assert bound / 2 <= min(delays) < max(delays) <= bound


def test_tls_is_spoken_with_a_certificate_of_ones_own(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.PEM)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    secure = grpc.server(futures.ThreadPoolExecutor(2))
    handlers = grpc.method_handlers_generic_handler("tg_tinker.v1.RunService", _get_run_only())
    secure.add_generic_rpc_handlers([handlers])
    port = secure.add_secure_port("localhost:0", grpc.ssl_server_credentials([(pem, cert)]))
    secure.start()

    def transport(url, **tls):
        config = ServiceConfig(base_url=url, timeout=5, retry_count=0, tls=True, api_key="tgk_x")
        return Transport(config, tls=TlsFiles(**tls))

    info = transport(f"grpcs://localhost:{port}", ca=cert).call(requests.get_run("r"))
    assert info == runs_pb2.RunInfo()
    with pytest.raises(ServerError, match="TLS"):
        transport(f"grpcs://localhost:{port}").call(requests.get_run("r"))
    config = ServiceConfig(base_url=f"localhost:{port}", timeout=5, retry_count=0, tls=False, api_key="tgk_x")
    with pytest.raises(ServerError, match="plaintext"):
        Transport(config).call(requests.get_run("r"))
    secure.stop(0)
