"""The examples as a user runs them: a process of its own, with nothing but what the script says it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed(name: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=folder,
        env={**os.environ, "TINKER_TELEMETRY": "0", **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart(tmp_path: Path) -> None:
    with EmbeddedServer(ServerConfig(port=0, data_dir=tmp_path / "server")) as server:
        text = printed(
            "quickstart.py", tmp_path, TG_TINKER_BASE_URL=server.address, TG_TINKER_API_KEY=server.mint_key()
        )
    epsilons = [float(e) for e in re.findall(r"epsilon (\S+)", text)]
    assert len(epsilons) == 5
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] <= 8
    assert re.search(r"^ckpt_\w+$", text, re.M)


def test_tinker_private(tmp_path: Path) -> None:
    text = printed("tinker_private.py", tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\S+) nats", text)]
    epsilons = [float(e) for e in re.findall(r"token, epsilon (\S+)", text)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 2  # nats per token; the model begins above 5
    assert epsilons == sorted(epsilons)
    assert float(re.search(r"ledger: .*epsilon (\S+) at", text)[1]) == pytest.approx(epsilons[-1], abs=0.005)
    assert epsilons[-1] <= 8
    assert "sample:" in text


@pytest.mark.slow  # three to five minutes
def test_federated(tmp_path: Path) -> None:
    assert "epsilon" in printed("federated_icd10.py", tmp_path)
