"""`tg-tinker federated`: keys, certificates, being a site and being a coordinator."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests.tg_tinker.federated.flower.federation import Federation, wait_until
from tg_tinker import ServiceClient, cli
from tg_tinker.commands import federated as commands
from tg_tinker.errors import ServerError
from tg_tinker.federated.flower import superlink
from tg_tinker.federated.keys import load_identity, make_identity, public_text
from tg_tinker.federated.site_config import SiteConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.main, ["federated", *map(str, arguments)])
    return done.exit_code, done.output


def test_keygen_makes_an_identity_and_prints_its_public_half(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "north.key"
    code, said = run("keygen", path)
    assert code == 0
    text = public_text(load_identity(path))
    assert said == f"{text}\n"
    assert (tmp_path / "keys" / "north.key.pub").read_text() == f"{text}\n"
    before = path.read_bytes()
    code, said = run("keygen", path)
    assert code == 1
    assert "never overwritten" in said
    assert path.read_bytes() == before
    path.unlink()
    assert run("keygen", path)[0] == 1
    assert not path.exists()


def test_certificates_and_node_keys_are_what_flower_is_given(tmp_path: Path) -> None:
    assert run("certificates", tmp_path / "tls", "--host", "link.example.org")[0] == 0
    assert sorted(p.name for p in (tmp_path / "tls").iterdir()) == ["ca.crt", "ca.key", "server.key", "server.pem"]
    code, said = run("node-key", tmp_path / "node.key")
    assert (code, said) == (0, f"{tmp_path / 'node.key.pub'}\n")
    assert run("certificates", tmp_path / "tls")[0] == 1


def test_certificates_are_all_made_or_none(tmp_path: Path) -> None:
    code, said = run("certificates", tmp_path / "tls", "--host", "https://c.example.org:8000")
    assert code == 1
    assert "without a scheme or port" in said
    assert not (tmp_path / "tls").exists()
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / "server.pem").touch()
    assert run("certificates", tmp_path / "tls")[0] == 1
    assert [p.name for p in (tmp_path / "tls").iterdir()] == ["server.pem"]


def site_toml(federation: Federation, *, flower: bool = True) -> Path:
    folder = federation.folder / "berlin"
    (folder / "api.key").touch(0o600)
    (folder / "api.key").write_text("tgk_nobody")
    lines = [
        'site = "berlin"',
        'server = "127.0.0.1:1"',
        'api_key_file = "api.key"',
        'dataset = "icd10"',
        'identity = "identity.key"',
        'state_dir = "state"',
        "[policy]",
        f'coordinator = "{public_text(federation.key)}"',
        'base_models = ["tiny"]',
        "max_record_tokens = 64",
    ]
    if flower:
        lines += [
            "[flower]",
            f'superlink = "127.0.0.1:{federation.port}"',
            'root_certificates = "../ca.crt"',
            'node_key = "node.key"',
        ]
    (folder / "site.toml").write_text("\n".join(lines))
    return folder / "site.toml"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_site_stops_with_all_that_it_started(tmp_path: Path, number: signal.Signals) -> None:
    federation = Federation(tmp_path, ["berlin"])
    site = subprocess.Popen(
        [sys.executable, "-m", "tg_tinker.cli", "federated", "site", "--config", site_toml(federation)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert wait_until(federation.programs, 20)
        site.send_signal(number)
        said, _ = site.communicate(timeout=20)
        assert site.returncode == 0, said
        assert said.splitlines()[-1] == "stopped"
        assert not federation.programs()
    finally:
        site.kill()
        federation.stop()


def test_a_site_without_a_flower_table_is_told(tmp_path: Path) -> None:
    code, said = run("site", "--config", site_toml(Federation(tmp_path, ["berlin"]), flower=False))
    assert code == 1
    assert "no [flower] table" in said


def coordinator_toml(folder: Path, *, flower: bool = True) -> Path:
    make_identity(folder / "coordinator.key")
    roster = public_text(make_identity(folder / "north.key"))
    lines = [
        'server = "127.0.0.1:1"',
        'api_key_env = "NOBODYS_KEY"',
        'identity = "coordinator.key"',
        'state_dir = "state"',
        "[job]",
        'job_id = "icd10"',
        'base_model = "tiny"',
        "rounds = 1",
        "batch_size = 4",
        "expires = 2100-01-01T00:00:00Z",
        f'roster = {{ north = "{roster}" }}',
    ]
    if flower:
        lines += [
            "[flower]",
            'ca = "ca.crt"',
            'certificate = "s.pem"',
            'key = "s.key"',
            'node_keys = { north = "n" }',
        ]
    (folder / "coordinator.toml").write_text("\n".join(lines))
    return folder / "coordinator.toml"


def test_a_coordinator_without_a_flower_table_or_an_api_key_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOBODYS_KEY", raising=False)
    (tmp_path / "a").mkdir()
    code, said = run("coordinator", "--config", coordinator_toml(tmp_path / "a", flower=False))
    assert code == 1
    assert "no [flower] table" in said
    (tmp_path / "b").mkdir()
    code, said = run("coordinator", "--config", coordinator_toml(tmp_path / "b"))
    assert code == 1
    assert "no API key" in said


class FakeLink:
    """A SuperLink that ends as often as it was told to."""

    ends = 0
    starts = 0
    runs_on = False

    def __init__(self, settings: object) -> None:
        pass

    def __enter__(self) -> FakeLink:
        FakeLink.starts += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def ended(self) -> str:
        return "" if FakeLink.runs_on else "flower-superlink ended: killed"

    def run(self, run: Any, *, roster: object, key: object) -> str:
        FakeLink.ends -= 1
        if FakeLink.ends >= 0:
            raise ServerError(self.ended() or "the coordinator's own server is away")
        return "result"


class FakeCoordinator:
    """Prepares without a server."""

    def __init__(self, config: Any, service: object, key: Any, **_: object) -> None:
        self._config, self._key = config, key

    def prepare(self) -> object:
        return self._config.job_with(coordinator=self._key, adapter_digest="0" * 64)

    def run(self, link: object) -> None:
        raise AssertionError


def own_site(server: EmbeddedServer, key: str, dataset: str = "icd10") -> SiteConfig:
    """A site's configuration for a server in this process."""
    policy = {
        "coordinator": "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=",
        "base_models": ["bigram"],
        "max_record_tokens": 64,
    }
    files = {"identity": Path("none"), "state_dir": Path("none"), "api_key_file": Path(key)}
    return SiteConfig(site="north", server=server.address, dataset=dataset, policy=policy, **files)  # type: ignore[arg-type]


def test_a_site_is_told_at_once_what_its_own_server_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path))

    def key_file(name: str, key: str) -> str:
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text(key)
        return str(tmp_path / name)

    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "server")) as server:
        good = key_file("good", server.mint_key())
        with pytest.raises(click.ClickException, match="has no dataset 'icd10'"):
            commands._check_own_server(own_site(server, good))
        with ServiceClient((tmp_path / "good").read_text(), server.address) as service:
            service.create_dataset("icd10", ["ab"] * 8, target_delta=1e-5)
        commands._check_own_server(own_site(server, good))
        for roles in (("trainer", "exporter"), ("trainer", "auditor")):
            with pytest.raises(click.ClickException, match="does not take this site's API key: this key may not"):
                commands._check_own_server(own_site(server, key_file("-".join(roles), server.mint_key(roles=roles))))
        with pytest.raises(click.ClickException, match="does not take this site's API key"):
            commands._check_own_server(own_site(server, key_file("wrong", "k")))
        assert capsys.readouterr().out == ""
        config = own_site(server, good)
    commands._check_own_server(config)
    said = capsys.readouterr().out
    assert "`server` in its TOML file" in said
    assert "until it is there" in said


class GivingUp(FakeCoordinator):
    """Only gives up."""

    def finish(self, link: Any) -> str:
        return f"given up with {link.sites()}"


class LateLink(FakeLink):
    """Its site is found at the third look."""

    looks = 0

    def sites(self) -> list[str]:
        self.looks += 1
        return ["north"] if self.looks > 2 else []

    def run(self, run: Any, *, roster: object, key: object) -> str:
        return str(run(self))


def test_who_gives_up_waits_for_the_sites_that_are_to_state_what_they_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOBODYS_KEY", "tgk_nobody")
    monkeypatch.setattr(superlink, "SuperLink", LateLink)
    monkeypatch.setattr("tg_tinker.federated.coordinator.Coordinator", GivingUp)
    path = coordinator_toml(tmp_path)
    path.write_text("pause_s = 0.01\n" + path.read_text())
    assert commands._coordinate(path, give_up=True) == "given up with ['north']"  # type: ignore[comparison-overlap]
    path.write_text("join_timeout_s = 0\n" + path.read_text())
    assert commands._coordinate(path, give_up=True) == "given up with []"  # type: ignore[comparison-overlap]


class Ended:
    """A result as far as the command reads it."""

    status, why, rounds, unstated, statements = "failed", "too few sites", (1,), {}, {"north": {}}


def test_a_failed_job_can_be_given_up_and_is_told_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def end(_path: Path, *, give_up: bool) -> type[Ended]:
        asked.append(give_up)
        return Ended

    monkeypatch.setattr(commands, "_coordinate", end)
    path = coordinator_toml(tmp_path)
    code, said = run("coordinator", "--config", path)
    assert code == 1
    assert "too few sites" in said
    assert "--give-up" in said
    assert run("coordinator", "--config", path, "--give-up") == (
        0,
        "given up after 1 rounds; 1 sites stated what they spent\n",
    )
    assert asked == [False, True]


def test_a_job_that_cannot_be_is_named_once(tmp_path: Path) -> None:
    path = coordinator_toml(tmp_path)
    path.write_text(path.read_text().replace("rounds = 1\n", "rounds = 1\nseed = 1152921504606846976\n"))
    code, said = run("coordinator", "--config", path)
    assert code == 1
    assert ": job.seed: " in said
    assert "the file" not in said


@pytest.mark.parametrize("ends", [0, 1, 5, 6])
def test_a_superlink_that_ends_is_started_again_up_to_five_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: int
) -> None:
    monkeypatch.setenv("NOBODYS_KEY", "tgk_nobody")
    monkeypatch.setattr(superlink, "SuperLink", FakeLink)
    monkeypatch.setattr("tg_tinker.federated.coordinator.Coordinator", FakeCoordinator)
    FakeLink.ends, FakeLink.starts = ends, 0
    path = coordinator_toml(tmp_path)
    if ends > 5:
        with pytest.raises(ServerError, match="superlink ended"):
            commands._coordinate(path)
    else:
        assert commands._coordinate(path) == "result"  # type: ignore[comparison-overlap]
    assert FakeLink.starts == min(ends, 5) + 1


def test_trouble_that_a_new_superlink_does_not_end_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOBODYS_KEY", "tgk_nobody")
    monkeypatch.setattr(superlink, "SuperLink", FakeLink)
    monkeypatch.setattr("tg_tinker.federated.coordinator.Coordinator", FakeCoordinator)
    monkeypatch.setattr(FakeLink, "runs_on", True)
    FakeLink.ends, FakeLink.starts = 1, 0
    code, said = run("coordinator", "--config", coordinator_toml(tmp_path))
    assert code == 1
    assert "own server is away" in said
    assert FakeLink.starts == 1


def test_an_operator_sees_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    commands._tell("a\x1b[31mb\nc")
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}c\n"


def test_without_flower_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tg_tinker.federated.flower.supernode", None)
    monkeypatch.setitem(sys.modules, "tg_tinker.federated.flower.apps", None)
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    for name in [n for n in sys.modules if n.startswith("tg_tinker.federated.flower.")]:
        monkeypatch.delitem(sys.modules, name)
    code, said = run("site", "--config", site_toml(Federation(tmp_path, ["berlin"])))
    assert code == 1
    assert "pip install 'tg-tinker[federation]'" in said
