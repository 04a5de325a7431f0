"""Weights of a federation through two servers: what the caller stated goes wherever they go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.test_exports import IDENTITY, PUBLIC, RECIPIENT, Site, private
from tg_tinker import DPUnsupportedError
from tg_tinker.exports import files
from tg_tinker.transparency.note import VerifierKey
from tg_tinker.types import WeightsSource

JOB = "c0" * 32


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    here, there = Site(tmp_path / "here"), Site(tmp_path / "there")
    yield here, there
    here.close()
    there.close()


def bring(site: Site, epsilon: float, round_: int = 4) -> str:
    table = np.random.default_rng(round_).normal(size=(260, 260)).astype(np.float32)
    source = WeightsSource(job=JOB, round=round_, epsilon=epsilon, delta=1e-6)
    made = site.service.import_weights({"table": table}, base_model="bigram", lora_config=None, step=9, source=source)
    return made.artifact_id


def claims_of(site: Site, artifact_id: str, path: Path) -> dict[str, Any]:
    site.service.export_artifact(artifact_id, RECIPIENT, path)
    reader = files.check(path, VerifierKey.parse(site.key), [str(IDENTITY)])
    return dict(reader.manifest.predicate)


def test_the_word_of_a_caller_goes_with_the_weights_through_exports_and_private_runs(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    here, there = sites
    artifact_id = bring(here, 2.25)
    claims = claims_of(here, artifact_id, tmp_path / "a.age")
    assert (claims["privacy"]["epsilon"], claims["privacy"]["attested_by"]) == ("2.25", "caller")
    info = there.service.import_artifact(tmp_path / "a.age", signer=here.key, identity=[str(IDENTITY)])
    assert info.step == 9
    run = there.trained(private("clinic"), start=info.artifact_id)
    further = claims_of(there, run.save_state().artifact_id, tmp_path / "b.age")
    assert further["privacy"]["dataset_id"] == "clinic"
    assert "attested_by" not in further["privacy"]
    (earlier,) = further["provenance"]
    assert earlier["origin"] == here.signer.origin  # the caller of that server said so
    assert earlier["privacy"] == claims["privacy"]
    assert claims["privacy"]["round"] == 4


def test_a_missing_promise_is_missing_wherever_the_weights_go(sites: tuple[Site, Site], tmp_path: Path) -> None:
    here, there = sites
    artifact_id = bring(here, math.inf)
    claims_of(here, artifact_id, tmp_path / "a.age")
    info = there.service.import_artifact(tmp_path / "a.age", signer=here.key, identity=[str(IDENTITY)])
    for site, brought in ((here, artifact_id), (there, info.artifact_id)):
        with pytest.raises(DPUnsupportedError, match="not in any budget"):
            site.trained(private("clinic"), steps=0, start=brought)
        saved = site.trained(PUBLIC, start=brought).save_state()
        with pytest.raises(DPUnsupportedError, match="not in any budget"):
            site.trained(private("clinic"), steps=0, start=saved.artifact_id)
        site.trained(private("clinic", initial_weights="public"), steps=0, start=saved.artifact_id)


def test_what_a_run_pulls_is_what_its_export_holds(sites: tuple[Site, Site], tmp_path: Path) -> None:
    here, _ = sites
    run = here.trained(private("clinic"), start=bring(here, 1.0))
    pulled = run.pull_weights().tensors["table"]
    here.service.export_artifact(run.save_state().artifact_id, RECIPIENT, tmp_path / "a.age")
    files.unpack(tmp_path / "a.age", VerifierKey.parse(here.key), tmp_path / "out", [str(IDENTITY)])
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert pulled.tobytes() in data
