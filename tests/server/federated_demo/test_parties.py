"""What each party writes: keys that only it can read, configurations that the real commands load."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.federated_demo.values import SMALL
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.site_config import SiteConfig
from tg_tinker_server.federated_demo.parties import COORDINATOR, parties, toml, write_coordinator, write_site

plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))
values = st.one_of(
    plain, st.integers(-(2**60), 2**60), st.booleans(), st.floats(-1e9, 1e9), st.lists(plain, max_size=3)
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), values, max_size=5))
def test_what_is_written_as_toml_is_read_back(table: dict[str, object]) -> None:
    assert tomllib.loads(toml({"": {"first": 1}, "part": table})) == {"first": 1, "part": table}


def test_parties_keep_their_keys_and_their_configurations_are_loaded_as_they_are(tmp_path: Path) -> None:
    found = parties(tmp_path, ["north", "south"])
    again = parties(tmp_path, ["north", "south"])
    assert {n: p.public_key() for n, p in found.items()} == {n: p.public_key() for n, p in again.items()}
    keys = {party.api_key.read_text() for party in found.values()}
    assert len(keys) == 3
    assert all(path.stat().st_mode & 0o077 == 0 for p in found.values() for path in (p.api_key, p.identity))

    north = dataclasses.replace(found["north"], address="127.0.0.1:50051")
    write_site(north, SMALL, coordinator=found[COORDINATOR].public_key(), flower={})
    policy = SiteConfig.load(north.config).policy
    coordinator = dataclasses.replace(found[COORDINATOR], address="127.0.0.1:50052")
    roster = {name: found[name].public_key() for name in ("north", "south")}
    job = {**SMALL.job(job_id="icd", expires="2030-01-01T00:00:00+00:00"), "roster": roster}
    write_coordinator(coordinator, job, flower={})
    config = CoordinatorConfig.load(coordinator.config)
    whole = config.job_with(coordinator=config.key(), adapter_digest="0" * 64)
    policy.check(whole, whole.expires.replace(year=2029))  # the site agrees to this job
    assert whole.records is not None
    assert (whole.total_steps, whole.records.target_epsilon) == (SMALL.steps, SMALL.target_epsilon)
    assert whole.adapter == SMALL.adapter()
    with pytest.raises(Exception, match="target_epsilon 9 is more than max_epsilon 8"):
        policy.check(
            whole.model_copy(update={"records": whole.records.model_copy(update={"target_epsilon": 9.0})}),
            whole.expires.replace(year=2029),
        )
