"""The listener: TLS as gRPC has it, the command that starts it, and what a private run is told."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from tests.e2e.test_listener import Party
from tests.server.gateway.conftest import Raw, config
from tg_tinker.errors import InvalidRequestError
from tg_tinker_server import cli
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import DEFAULT_TINKER_PORT, ServerConfig


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
