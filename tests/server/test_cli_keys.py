"""The key commands, as an operator types them."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tg_tinker import cli
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.foundation import Foundation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    foundation = Foundation.open(ServerConfig(data_dir=tmp_path / "data"))
    foundation.desk.mint("acme")
    foundation.desk.mint("other")
    foundation.db.close()
    return tmp_path / "data"


def keys(folder: Path, *words: str, typed: str | None = None) -> Result:
    command, *rest = words
    return CliRunner().invoke(cli.main, ["keys", command, "--data-dir", str(folder), *rest], input=typed)


def verifier_key(folder: Path, tenant: str) -> str:
    foundation = Foundation.open(ServerConfig(data_dir=folder))
    found = TenantSigner(foundation.keyring).signer(tenant).verifier_key
    foundation.db.close()
    return found


def test_show_names_versions_and_the_key_to_hand_out_and_no_secret(folder: Path) -> None:
    said = keys(folder, "show").output
    assert "root key  file:" in said
    assert "acme  v1" in said
    assert verifier_key(folder, "acme") in said
    assert str(folder) not in said
    assert (folder / "root.key").read_text().strip() not in said


def test_rotate_gives_everybody_a_new_version_and_only_destroys_when_told(folder: Path) -> None:
    before = verifier_key(folder, "acme")
    done = keys(folder, "rotate")
    assert done.exit_code == 0
    assert "tenant-kek/acme/v2" in done.output
    assert "tenant-kek/other/v2" in done.output
    assert "acme  v1, v2" in keys(folder, "show").output
    done = keys(folder, "rotate", "--tenant", "acme", "--destroy-old")
    assert "tenant-kek/acme/v3" in done.output
    said = keys(folder, "show").output
    assert "acme  v1 (destroyed), v2 (destroyed), v3" in said
    assert "other  v1, v2" in said
    assert verifier_key(folder, "acme") == before
    assert "tenant-kek/acme/v3" in keys(folder, "rotate", "--tenant", "acme", "--resume").output


def test_a_tenant_that_is_not_there_is_refused(folder: Path) -> None:
    for words in (("rotate", "--tenant", "nobody"), ("shred", "nobody")):
        done = keys(folder, *words)
        assert done.exit_code == 1
        assert "there is no tenant 'nobody'" in done.output


def test_shred_asks_for_the_name_and_does_nothing_on_another(folder: Path) -> None:
    for typed, words in (("acm\n", ()), ("y\n", ()), (None, ("--confirm", "other"))):
        done = keys(folder, "shred", "acme", *words, typed=typed)
        assert done.exit_code == 1
        assert "nothing was changed" in done.output
    assert "acme  v1" in keys(folder, "show").output
    done = keys(folder, "shred", "acme", typed="acme\n")
    assert done.exit_code == 0
    assert "1 API keys revoked" in done.output
    said = keys(folder, "show").output
    assert "acme" not in said
    assert "other  v1" in said
    assert "destroyed and nothing of it can be read" in keys(folder, "create", "--tenant", "acme").output


def test_the_servers_own_tenant_is_not_shredded(folder: Path) -> None:
    assert "without its key no API key works" in keys(folder, "shred", "_server", "--confirm", "_server").output


def test_the_root_key_moves_to_another_file_and_the_old_one_no_longer_opens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new.key"
    new.write_text(base64.b64encode(bytes(range(32))).decode())
    new.chmod(0o600)
    before = verifier_key(folder, "acme")
    assert "nothing was changed" not in keys(folder, "rewrap-root", "--to", f"file:{new}").output
    done = keys(folder, "show")
    assert done.exit_code == 1
    assert "does not open under this server's root key" in done.output
    monkeypatch.setenv("TG_TINKER_SERVER_ROOT_KEY", f"file:{new}")
    assert before in keys(folder, "show").output


def test_what_needs_the_server_stopped_says_so_while_it_runs(folder: Path) -> None:
    holder = Foundation.open(config := ServerConfig(data_dir=folder))
    locks = holder.lock(config)
    try:
        for words in (
            ("rotate", "--destroy-old"),
            ("shred", "acme", "--confirm", "acme"),
            ("rewrap-root", "--to", "env:NONE"),
        ):
            done = keys(folder, *words)
            assert done.exit_code == 1
            assert "another server uses" in done.output
        assert keys(folder, "rotate", "--tenant", "acme").exit_code == 0
    finally:
        for file in locks:
            file.close()
        holder.db.close()


def test_the_commands_do_not_wait_for_torch(folder: Path) -> None:
    code = "import sys; from tg_tinker_server import cli_keys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
