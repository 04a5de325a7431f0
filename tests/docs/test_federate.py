"""The configurations on the page about federations are such as the commands take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.test_pages import DOCS
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.keys import make_identity, public_text
from tg_tinker.federated.site_config import SiteConfig

PAGE = (DOCS / "how-to" / "federate.md").read_text()
COORDINATOR, SITE, APART = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("north", "south", "west"):
        key = make_identity(tmp_path / f"{name}.key")
        (tmp_path / f"{name}.key.pub").write_text(public_text(key) + "\n")
    return tmp_path


def test_both_configurations_load_and_fit_each_other(folder: Path) -> None:
    (folder / "coordinator.toml").write_text(COORDINATOR)
    config = CoordinatorConfig.load(folder / "coordinator.toml")
    key = make_identity(folder / "coordinator.key")
    job = config.job_with(coordinator=key, adapter_digest="0" * 64)
    shown = re.search(r'^coordinator = "(.*)"$', SITE, flags=re.MULTILINE)
    assert shown is not None
    (folder / "site.toml").write_text(SITE.replace(shown[1], public_text(key)))
    site = SiteConfig.load(folder / "site.toml")
    assert site.site in job.roster
    site.policy.check(job, now=job.expires.replace(year=2029))
    assert config.flower is not None
    assert set(config.flower.node_keys) == set(job.roster)
    assert site.flower is not None


def test_a_site_may_find_its_supernode_elsewhere_as_the_page_says(folder: Path) -> None:
    (folder / "site.toml").write_text(SITE[: SITE.index("[flower]")] + APART)
    flower = SiteConfig.load(folder / "site.toml").flower
    assert flower is not None
    assert flower.supernode is not None
    assert f"--port {flower.supernode.rpartition(':')[2]} " in PAGE
    assert flower.tasks_secret == folder / "tasks.secret"
    assert f"--superexec-auth-secret-file {flower.tasks_secret.name}\n" in PAGE


def test_the_page_says_the_defaults_that_hold(folder: Path) -> None:
    (folder / "coordinator.toml").write_text(COORDINATOR)
    config = CoordinatorConfig.load(folder / "coordinator.toml")
    assert config.flower is not None
    assert f"{config.max_update_norm:.0f} if it is not given" in PAGE
    assert f"`join_timeout_s` ({config.join_timeout_s:.0f})" in PAGE
    assert config.flower.largest_body == 2 * 2**30
    assert "`largest_body` under `[flower]`, 2 GiB" in PAGE


def test_the_page_names_every_reason_to_refuse_that_a_user_meets() -> None:
    reasons = re.findall(r"^\| `(\w+)`", PAGE, flags=re.MULTILINE)
    documented = (DOCS / "errors" / "federation_refused.md").read_text()
    assert reasons
    assert [r for r in reasons if f"| `{r}` |" not in documented] == []
