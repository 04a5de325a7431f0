"""`federated report` and `audit verify` over jobs that real sites and a real coordinator have run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.tg_tinker.federated.coordinating import KEY, coordinator, fake_sites, link_to
from tests.tg_tinker.federated.reported import COORDINATOR, honest, site_report
from tests.tg_tinker.federated.site_lab import TEXTS, Party
from tests.tg_tinker.reports.conftest import settled_forge
from tg_tinker import ServiceClient
from tg_tinker.cli import main
from tg_tinker.federated.keys import make_identity, public_text, write_secret
from tg_tinker.federated.report import coordinator_key
from tg_tinker.privacy import gate_epsilon
from tg_tinker.reports.statement import rounded_up
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

PUBLIC = public_text(KEY)


def run(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [*map(str, args)])
    return done.exit_code, done.output


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "mine"))
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "server")) as running:
        yield running


@pytest.fixture
def service(server: EmbeddedServer):
    with ServiceClient(server.mint_key("coordinator"), server.address) as service:
        yield service


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    path = tmp_path / "coordinator.key"
    write_secret(path, KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def saved(folder: Path, result: object) -> Path:
    path = folder / "result.json"
    path.write_text(result.model_dump_json(indent=2))  # type: ignore[attr-defined]
    return path


def test_real_sites_are_reported_on_and_one_shows_its_whole_report(server, service, tmp_path: Path, identity) -> None:
    sites = []
    for name, disclose in (("site-0", False), ("site-1", True)):
        party = Party(server, tmp_path / name, name=name, api_key=server.mint_key(f"tenant-{name}"))
        party.policy = {"disclose_accounting": disclose}
        party.register(TEXTS, target_epsilon=8.0)
        sites.append(party)
    job = {"sites": 2, "rounds": 2, "local_steps": 2, "records": {}, "batch_size": 4, "min_sites": 2}
    result = coordinator(tmp_path / "c", service, job=job).run(link_to(sites))
    assert result.status == "finished", result.why
    assert result.unstated == {}

    out = tmp_path / "out"
    code, said = run("federated", "report", saved(tmp_path, result), "--key", identity, "--out", out)
    assert code == 0, said
    report = out / "federation-report.json"
    assert f"audit verify federation-report.json --key {coordinator_key(KEY.public_key()).text}" in said
    statements = {s: json.loads(_payload(result.statements[s])) for s in ("site-0", "site-1")}
    accounting = statements["site-1"]["accounting"]
    charged = gate_epsilon({(float(accounting["noise_multiplier"]), 4 / 16): 4}, 1e-5)
    assert statements["site-1"]["epsilon"] == rounded_up(charged, 2)

    for key in (PUBLIC, coordinator_key(KEY.public_key()).text):
        code, said = run("audit", "verify", report, "--key", key)
        assert code == 0, said
        assert "1 sites disclose noise, rate and steps" in said
        assert "1 disclose nothing" in said
        assert said.rstrip().endswith(f"verified: {report}")
    with sites[0].state() as state:
        (digest,) = [r.digest for r in [state.job(result.job_digest)] if r is not None]
        full = state.report(digest)
    assert hashlib.sha256(full).hexdigest() == statements["site-0"]["report_sha256"]
    (tmp_path / "site-0.json").write_bytes(full)
    code, said = run("audit", "verify", report, "--key", PUBLIC, "--site-report", tmp_path / "site-0.json")
    assert code == 0, said
    assert "ok       site report: what site-0 states of its data follows from it" in said

    code, said = run("audit", "verify", report)
    assert code == 1
    assert "REFUSED  signer: its signer" in said
    assert coordinator_key(KEY.public_key()).text in said  # for a person to compare


def test_whole_sites_are_reported_on_from_the_ledger_of_the_coordinators_server(
    server, service, tmp_path: Path, identity, monkeypatch
) -> None:
    many = {"population": 400_000, "sample_rate": 0.5, "noise_multiplier": 3.0, "target_epsilon": 20.0,
            "target_delta": 1e-7}  # fmt: skip
    job = {"sites": 3, "rounds": 2, "records": {}, "sites_privacy": many}
    result = coordinator(tmp_path / "c", service, job=job).run(link_to(fake_sites(3)))
    assert result.status == "finished", result.why
    path, out = saved(tmp_path, result), tmp_path / "out"
    code, said = run("federated", "report", path, "--key", identity, "--out", out)
    assert code == 1
    assert f"tg-tinker privacy report {result.sites.dataset_id}" in said
    level = tmp_path / "report.json"
    level.write_bytes(service.get_signed_report(result.sites.dataset_id))
    code, said = run("federated", "report", path, "--key", identity, "--out", out, "--site-level-report", level)
    assert code == 0, said
    code, said = run("audit", "verify", out / "federation-report.json", "--key", PUBLIC)
    assert code == 0, said
    assert "ok       sites: 2 charges for 2 released rounds, on the terms of the job" in said
    epsilon = rounded_up(gate_epsilon({(3.0, 0.5): 2}, 1e-7)).rstrip("0")
    assert f"factor of exp({epsilon})" in said


def test_what_cannot_be_reported_is_said_plainly(tmp_path: Path, identity: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    code, said = run("federated", "report", tmp_path / "result.json", "--key", identity)
    assert code == 1
    assert "is not what `federated coordinator --result` writes" in said
    other = tmp_path / "other.key"
    make_identity(other)
    path = saved(tmp_path, honest().result)
    code, said = run("federated", "report", path, "--key", other, "--out", tmp_path / "out")
    assert code == 1
    assert "this is not the key of the job's coordinator" in said
    (tmp_path / "file").touch()
    code, said = run("federated", "report", path, "--key", identity, "--out", tmp_path / "file" / "out")
    assert code == 1
    assert "cannot write to" in said
    assert not (tmp_path / "out").exists()


def test_a_sites_report_beside_another_document_is_not_passed_over(tmp_path: Path) -> None:
    forge = settled_forge().close()
    (tmp_path / "report.json").write_bytes(forge.sign())
    (tmp_path / "site.json").write_bytes(site_report("site-0", 6))
    given = ["audit", "verify", tmp_path / "report.json", "--key", forge.key.text]
    assert run(*given)[0] == 0
    code, said = run(*given, "--site-report", tmp_path / "site.json")
    assert code == 1
    assert "REFUSED  site report: a site's report goes with a federation report" in said


def test_verifying_needs_neither_the_server_nor_flower_nor_a_network(tmp_path: Path) -> None:
    (tmp_path / "federation-report.json").write_bytes(honest().sign())
    forbidden = ("tg_tinker_server", "flwr", "torch", "transformers")
    code = (
        "import socket, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {forbidden!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "socket.socket.connect = None\n"
        "from tg_tinker.cli import main\n"
        f"main(['audit', 'verify', {str(tmp_path / 'federation-report.json')!r}, '--key', "
        f"{public_text(COORDINATOR)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified: " in done.stdout


def _payload(envelope: dict[str, str]) -> bytes:
    from tg_tinker.transparency._encoding import from_base64

    return from_base64(envelope["payload"])
