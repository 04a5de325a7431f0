"""The listener: TLS as gRPC has it, the command that starts it, and what a private run is told."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from click.testing import CliRunner

from tests.e2e.test_listener import Party
from tests.server.gateway.conftest import Raw, config
from tg_tinker.errors import InvalidRequestError
from tg_tinker_server import cli
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import DEFAULT_TINKER_PORT, ServerConfig
from tg_tinker_server.gateway import connections


def test_tls_and_client_certificates_hold_here_too(tmp_path: Path) -> None:
    ca = Party(tmp_path, "ca")
    mine, stranger = Party(tmp_path, "client", ca), Party(tmp_path, "stranger", Party(tmp_path, "foreign"))
    served = Party(tmp_path, "server", ca)
    files = {"tls_cert": served.cert_file, "tls_key": served.key_file, "tls_client_ca": ca.cert_file}
    with EmbeddedServer(config(tmp_path / "data", **files)) as server:
        assert server.tinker_url.startswith("https://")
        key = server.mint_key()

        def ask(party: Party | None) -> str:
            context = ssl.create_default_context(cafile=str(ca.cert_file))
            if party is not None:
                context.load_cert_chain(party.cert_file, party.key_file)
            with httpx.Client(verify=context) as http:
                return Raw(server.tinker_url, key, http=http).open().session

        assert len(ask(mine)) == 32
        for party in (None, stranger):
            with pytest.raises(httpx.TransportError):
                ask(party)
        with pytest.raises(httpx.TransportError):
            httpx.get(server.tinker_url.replace("https", "http") + "/api/v1/healthz").raise_for_status()


def test_tls_files_that_do_not_fit_are_told(tmp_path: Path) -> None:
    one, two = Party(tmp_path, "one"), Party(tmp_path, "two")
    files = {"tls_cert": one.cert_file, "tls_key": two.key_file}
    with pytest.raises(InvalidRequestError, match="TLS"):
        EmbeddedServer(config(tmp_path / "data", **files)).start()


def test_the_command_takes_the_port_or_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[ServerConfig] = []

    async def remember(settings: ServerConfig, _foundation: object) -> None:
        seen.append(settings)

    monkeypatch.setattr(cli, "_serve", remember)
    for given in (["--tinker-api"], ["--tinker-api", "0"], []):
        data = ["--data-dir", str(tmp_path / "d")]
        result = CliRunner().invoke(cli.serve, [*given, *data] if given != ["--tinker-api"] else [*data, *given])
        assert result.exit_code == 0, result.output
    assert [c.tinker_port for c in seen] == [DEFAULT_TINKER_PORT, 0, None]


def test_a_private_step_tells_what_is_spent_and_the_next_beyond_the_budget_is_refused(tmp_path: Path) -> None:
    with EmbeddedServer(config(tmp_path)) as server:
        client = Raw(server.tinker_url, server.mint_key()).open()
        model = client.create(base_model="bigram:dp-eps8-noise1.0")
        spent, seq = [], 1
        while True:
            passed = client.retrieve(client.train(model, seq, [1, 2, 3], [4, 5, 6]), proto=True)
            if not isinstance(passed, bytes):
                break
            stepped = client.retrieve(client.step(model, seq + 1))
            spent.append(stepped["metrics"]["privacy/epsilon"])
            assert stepped["metrics"]["privacy/target_epsilon"] == 8.0
            seq += 2
        assert spent
        assert spent == sorted(spent)
        assert spent[-1] <= 8.0
        assert passed["category"] == "user"
        assert "epsilon" in passed["error"]


def _raw(server: EmbeddedServer) -> socket.socket:
    url = urlsplit(server.tinker_url)
    return socket.create_connection((url.hostname, url.port), timeout=60)  # type: ignore[arg-type]


def _answer(connection: socket.socket) -> int:
    """The status of the next answer, which is read to its end."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def _is_closed(connection: socket.socket) -> bool:
    """Reads to the end; one that stays open is a TimeoutError."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nX-A: "], ids=["url", "header"])
def test_endless_headers_are_not_read(server: EmbeddedServer, start: bytes) -> None:
    connection = _raw(server)
    connection.sendall(start)
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 64 * 2**20:
            sent += connection.send(b"a" * 65536)
    assert sent < 16 * 2**20  # what the two sockets hold


def test_half_a_request_is_waited_for_a_while_and_a_whole_one_as_long_as_it_takes(
    server: EmbeddedServer, client: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 1.0)
    silent, half, refused = _raw(server), _raw(server), _raw(server)
    half.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n")
    refused.sendall(b"POST /api/v1/asample HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    answer = refused.recv(4096)
    assert b" 401 " in answer
    refused.sendall(b"{")
    assert all(_is_closed(c) for c in (silent, half, refused))
    whole = _raw(server)
    key = f"X-API-Key: tml-{client.key}\r\n".encode()
    whole.sendall(b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: 2\r\n\r\n{")
    time.sleep(1.5)
    whole.sendall(b"}")
    assert _answer(whole) == 200
    time.sleep(1.5)  # between requests it may rest
    whole.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert _answer(whole) == 200


def test_strangers_leave_first_where_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 16)
    with EmbeddedServer(config(tmp_path)) as server:
        client = Raw(server.tinker_url, server.mint_key()).open()
        strangers = [_raw(server) for _ in range(40)]
        for stranger in strangers[-10:]:
            stranger.sendall(b"GET /api/v1/healthz HTTP/1.1\r\n")
        assert _is_closed(strangers[0])
        held = client.ok("create_session", {"tags": []})  # on the connection that it had
        assert held["session_id"]
        assert len(Raw(server.tinker_url, client.key).open().session) == 32  # and on a new one


def _half(server: EmbeddedServer, client: Raw) -> socket.socket:
    """A request with a key and the first byte of its body."""
    connection = _raw(server)
    key = f"X-API-Key: tml-{client.key}\r\n".encode()
    head = b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: 60000\r\n\r\n"
    connection.sendall(head + b"{")
    return connection


def test_a_body_that_comes_too_slowly_is_not_waited_for(
    server: EmbeddedServer, client: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BODY_S", 3.0)
    monkeypatch.setattr(connections, "BODY_BYTES", 1000)
    still, trickling, steady = (_half(server, client) for _ in range(3))
    trickled = True
    for _ in range(7):
        time.sleep(0.75)
        steady.sendall(b" " * 1000)
        with contextlib.suppress(ConnectionError):
            trickling.sendall(b" ")
            continue
        trickled = False
    assert not trickled
    assert _is_closed(still)
    steady.sendall(b"}" + b" " * (60000 - 7000 - 2))
    assert _answer(steady) == 200
    time.sleep(3.5)  # nothing is under way any more
    steady.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert _answer(steady) == 200


def test_one_key_does_not_keep_the_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 16)
    with EmbeddedServer(config(tmp_path)) as server, contextlib.ExitStack() as stack:
        held = Raw(server.tinker_url, server.mint_key("held")).open()
        greedy = Raw(server.tinker_url, server.mint_key("greedy", roles=("auditor",)))
        slow = []
        for _ in range(20):
            slow.append(stack.enter_context(_half(server, greedy)))
            time.sleep(0.02)  # so that it is not a stranger any more
        others = [Raw(server.tinker_url, server.mint_key(f"other{n}")).open() for n in range(3)]
        assert all(len(other.session) == 32 for other in others)
        assert _is_closed(slow[0])
        waiting = stack.enter_context(_raw(server))  # without a key yet
        for _ in range(3):
            stack.enter_context(_half(server, greedy))
            time.sleep(0.02)
        waiting.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in waiting.recv(4096)
        assert held.ok("create_session", {"tags": []})["session_id"]
