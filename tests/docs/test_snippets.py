"""Pages and examples run as they are written."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pyrage
import pytest

from tests.docs.snippets import snippets
from tg_tinker import LoRAConfig, ServiceClient, TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.crypto.signing import TenantSigner

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("documented_server")
@pytest.mark.parametrize(("page", "blocks"), [("README.md", 1), ("docs/quickstart.md", 4)])
def test_the_marked_blocks_of_a_page_run_in_order(page: str, blocks: int, capsys: pytest.CaptureFixture[str]) -> None:
    marked = [s for s in snippets(ROOT / page) if s.marked]
    assert len(marked) == blocks
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in marked:
        snippet.execute(namespace)
    printed = capsys.readouterr().out
    epsilons = [float(e) for e in re.findall(r"step \d+: .*epsilon ([0-9.]+)", printed)]
    assert len(epsilons) == 5
    assert epsilons == sorted(epsilons)
    assert 7.5 < epsilons[-1] <= 8.0


@pytest.mark.usefixtures("documented_server")
def test_the_page_on_datasets_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for snippet in (s for s in snippets(ROOT / "docs" / "how-to" / "datasets.md") if s.marked):
        snippet.execute(namespace)
    printed = capsys.readouterr().out
    epsilons = [float(e) for e in re.findall(r"step \d+: epsilon ([0-9.]+) of 8", printed)]
    assert len(epsilons) == 3
    assert 7.5 < epsilons[-1] <= 8.0
    assert "erased: 2 left: 198 slots: 200" in printed


@pytest.mark.usefixtures("documented_server")
@pytest.mark.parametrize(
    ("page", "blocks", "says"),
    [
        ("token-api.md", 3, ["step 3", "goes on at step 3", "adapter_model.safetensors", "taken in as ckpt_"]),
        ("custom-losses.md", 2, ["tokens 5.0", "of which l1", "custom/gain:mean"]),
    ],
)
def test_the_pages_on_tokens_and_losses_run(
    page: str, blocks: int, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    marked = [s for s in snippets(ROOT / "docs" / "how-to" / page) if s.marked]
    assert len(marked) == blocks
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in marked:
        snippet.execute(namespace)
    printed = capsys.readouterr().out
    assert [text for text in says if text not in printed] == []


def test_the_page_on_sharing_a_model_runs(
    documented_server: EmbeddedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    identity = pyrage.x25519.Identity.generate()
    Path("key.txt").write_text(f"{identity}\n")
    config = TrainingConfig(model_ref="tiny-llama-2m", batch_size=2, lora_config=LoRAConfig(rank=2))
    with ServiceClient() as service:
        checkpoint = service.create_training_client(config).save_state()
        verifier_key = TenantSigner(documented_server._foundation.keyring).signer("documents").verifier_key
        namespace: dict[str, object] = {
            "service": service,
            "checkpoint": checkpoint,
            "config": config,
            "recipient": str(identity.to_public()),
            "verifier_key": verifier_key,
        }
        for snippet in (s for s in snippets(ROOT / "docs" / "how-to" / "share-a-model.md") if s.marked):
            snippet.execute(namespace)
    printed = capsys.readouterr().out
    assert "export.age sha256:" in printed
    assert "goes on at step 0" in printed


def test_the_derived_gradients_are_those_of_autograd(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = (s for s in snippets(ROOT / "docs" / "how-dp-lora-works.md") if s.marked)
    snippet.execute({})
    assert capsys.readouterr().out == "largest difference below 1e-12: True\n"


def test_the_planned_run_is_the_one_the_page_speaks_of() -> None:
    (snippet,) = (s for s in snippets(ROOT / "docs" / "how-to" / "choose-a-budget.md") if s.marked)
    namespace: dict[str, Any] = {}
    snippet.execute(namespace)
    assert namespace["config"].dp_config.target_epsilon == 8
    assert namespace["config"].max_steps == namespace["found"].steps > 90  # more noise than on the page: more steps


@pytest.mark.usefixtures("documented_server")
def test_the_quickstart_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    assert "step 5: epsilon" in capsys.readouterr().out


def test_the_readme_shows_the_example_that_is_run() -> None:
    """Formatting aside, the ten lines exist once."""

    def words(code: str) -> str:
        return re.sub(r"[\s,]+", "", code)

    (shown,) = (s.code for s in snippets(ROOT / "README.md") if s.marked)
    script = (ROOT / "examples" / "quickstart.py").read_text().split('"""', 2)[2]
    assert words(shown) == words(script)
