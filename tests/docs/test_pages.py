"""The documents keep up with the code: every package, error, setting and link."""

from __future__ import annotations

import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import tg_tinker
import tg_tinker_server
from tg_tinker import errors
from tg_tinker.types import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker_server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
ERRORS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.TGTinkerError)]


def packages() -> list[str]:
    """Both packages and every package right below them."""
    found = []
    for top in (tg_tinker, tg_tinker_server):
        below = [m.name for m in pkgutil.iter_modules(top.__path__) if m.ispkg]
        found += [top.__name__, *(f"{top.__name__}.{name}" for name in below)]
    return found


@pytest.mark.parametrize("package", packages())
def test_the_architecture_page_has_every_package_in_one_line(package: str) -> None:
    lines = (DOCS / "architecture.md").read_text().splitlines()
    assert sum(line.startswith(f"| `{package}` |") for line in lines) == 1


@pytest.mark.parametrize("error", ERRORS, ids=lambda c: c.__name__)
def test_every_error_has_a_page_that_says_what_to_do(error: type[errors.TGTinkerError]) -> None:
    page = (DOCS / "errors" / f"{error.code.lower()}.md").read_text()
    assert page.startswith(f"# {error.code}\n")
    assert f"`tg_tinker.errors.{error.__name__}`" in page
    assert "**What to do.**" in page
    assert f"({error.code.lower()}.md)" in (DOCS / "errors" / "index.md").read_text()


@pytest.mark.parametrize("config", [TrainingConfig, LoRAConfig, OptimizerConfig, DPConfig, ServerConfig])
def test_every_setting_is_on_the_configuration_page(config: type) -> None:
    text = (DOCS / "configuration.md").read_text()
    missing = [name for name in config.model_fields if f"`{name}`" not in text]  # type: ignore[attr-defined]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert broken == []
