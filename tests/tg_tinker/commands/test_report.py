"""`privacy report` and `audit verify`: from a real server to a file, and from the file to a verdict without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.tg_tinker.ledger.test_audits import RESULT
from tests.tg_tinker.reports.conftest import Forge, settled_forge
from tg_tinker import DPConfig, LoRAConfig, ServiceClient, TrainingConfig
from tg_tinker.cli import main
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(args))
    return done.exit_code, done.output


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "mine"))
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "server")) as running:
        monkeypatch.setenv("TG_TINKER_BASE_URL", running.address)
        monkeypatch.setenv("TG_TINKER_API_KEY", running.mint_key("clinic"))
        yield running


def trained(service: ServiceClient, *, steps: int = 2) -> str:
    dp = DPConfig(target_epsilon=8.0, target_delta=1e-5, noise_multiplier=2.0, dataset_id="notes")
    client = service.create_training_client(
        TrainingConfig(model_ref="bigram", lora_config=LoRAConfig(), dp_config=dp)
    )
    for step in range(steps):
        client.forward_backward({"input_ids": np.array([[1, 2, 3, step + 1]])}).result()
        client.optim_step().result()
    return client.id


def test_a_report_is_fetched_checked_written_and_checked_again(server: EmbeddedServer, tmp_path: Path) -> None:
    with ServiceClient() as service:
        run_id = trained(service)
        service.create_training_client(TrainingConfig(model_ref="bigram", lora_config=LoRAConfig()))
    for name in ("notes", run_id):
        code, said = run("privacy", "report", name, "--out", str(tmp_path / name))
        assert code == 0, said
        assert "Adding or removing one record" in said
        file, page = tmp_path / name / "report.json", (tmp_path / name / "report.html").read_text()
        assert "notes" in page
        code, said = run("audit", "verify", str(file))
        assert code == 0, said
        assert said.rstrip().endswith(f"verified: {file}")
        assert "all 2 of your own receipts from before it are among the entries" in said
        file.write_bytes(file.read_bytes().replace(b"payload", b"Payload", 1))
        code, said = run("audit", "verify", str(file))
        assert code == 1
        assert "REFUSED" in said


def test_a_service_gives_the_report_as_a_value_and_as_what_was_signed(server: EmbeddedServer) -> None:
    with ServiceClient() as service:
        run_id = trained(service)
        report = service.get_privacy_report(run_id)
        assert report["dataset_id"] == "notes"
        assert report["coverage"]["earlier_reports"] == 0
        assert json.loads(service.get_signed_report("notes")).keys() == {"payload", "payloadType", "signatures"}
        assert service.get_privacy_report("notes")["coverage"]["earlier_reports"] == 2
        with pytest.raises(ResourceNotFoundError):
            service.get_privacy_report("no-such-dataset")
        plain = service.create_training_client(TrainingConfig(model_ref="bigram", lora_config=LoRAConfig()))
        with pytest.raises(InvalidRequestError, match="no differential privacy"):
            service.get_privacy_report(plain.id)


def test_another_tenants_dataset_and_run_are_not_found(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServiceClient() as service:
        run_id = trained(service, steps=1)
    with ServiceClient(api_key=server.mint_key("another")) as service:
        for name in ("notes", run_id):
            with pytest.raises(ResourceNotFoundError):
                service.get_privacy_report(name)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said = run("privacy", "report", "notes", "--out", str(tmp_path / "file" / "below"))
    assert code == 1
    assert "cannot write to" in said


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report of a server that nobody here knows."""
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "mine"))
    path = tmp_path / "report.json"
    path.write_bytes(settled_forge().close().sign())
    return path


def test_an_unknown_signer_needs_a_key_and_a_wrong_one_is_refused(file: Path) -> None:
    key = Forge().key
    code, said = run("audit", "verify", str(file))
    assert code == 1
    assert f"signer: its signer, key {key.key_hash.hex()} ({key.text}), is not known here" in said
    assert run("audit", "verify", str(file), "--key", key.text)[0] == 0
    code, said = run("audit", "verify", str(file), "--key", key.text[:-4])
    assert code == 1
    assert "REFUSED  a verifier key" in said


def test_what_comes_out_of_a_document_cannot_drive_the_terminal(tmp_path: Path) -> None:
    forge = Forge(dataset_id="x").open(run="run_\x1b[2J")
    forge.charge(1, "run_\x1b[2J")
    document = forge.close().document()
    document["coverage"]["\x1b[31mfine"] = 1
    (tmp_path / "report.json").write_bytes(forge.sign(document))
    code, said = run("audit", "verify", str(tmp_path / "report.json"), "--key", forge.key.text)
    assert code == 1
    assert "\x1b" not in said


def test_verifying_needs_neither_the_server_nor_a_network(file: Path) -> None:
    program = (
        "import sys, socket\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'tg_tinker_server', 'torch', 'opacus', 'sqlalchemy', 'transformers'}:\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "def refuse(*args, **kw): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from tg_tinker.cli import main\n"
        "main()\n"
    )
    args = [sys.executable, "-c", program, "audit", "verify", str(file), "--key", Forge().key.text]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout


def test_without_dp_accounting_the_error_says_what_to_install(file: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['dp_accounting'] = sys.modules['dp_accounting.pld'] = None\n"
        "from tg_tinker.cli import main\n"
        "main()\n"
    )
    args = [sys.executable, "-c", program, "audit", "verify", str(file), "--key", Forge().key.text]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "pip install 'tg-tinker[audit]'" in done.stdout


def test_an_audit_is_noted_and_every_later_report_says_so(server: EmbeddedServer, tmp_path: Path) -> None:
    result = tmp_path / "audit.json"
    result.write_text(json.dumps(RESULT))
    with ServiceClient() as service:
        trained(service, steps=1)
    code, said = run("audit", "attach", str(result), "notes")
    assert (code, said) == (0, "noted in the ledger of notes; its next report says it\n")
    code, said = run("privacy", "report", "notes", "--out", str(tmp_path))
    assert code == 0, said
    page = (tmp_path / "report.html").read_text()
    assert "1.2" in page
    assert "not run" not in page
    code, said = run("audit", "verify", str(tmp_path / "report.json"))
    assert code == 0, said


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff\xfe", json.dumps({**RESULT, "alarm": True}).encode()])
def test_what_is_no_audit_is_not_noted(server: EmbeddedServer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "audit.json").write_bytes(content)
    with ServiceClient() as service:
        trained(service, steps=1)
        code, said = run("audit", "attach", str(tmp_path / "audit.json"), "notes")
        assert code == 1
        assert said.startswith("Error: ")
        assert [e.kind for e in service.get_privacy_ledger("notes").entries] == ["open", "charge", "settle"]
