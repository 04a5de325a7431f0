"""Version 1 of masked rounds, byte by byte: the library, the reader on the documentation's page and a file agree."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.tg_tinker.federated.masking.parties import Federation, make_job, plain_mean
from tg_tinker.federated.job import Job
from tg_tinker.federated.masking import MaskedMean, MaskingSite, error_bound

ROOT = Path(__file__).parents[4]
SPECIMEN: dict[str, Any] = json.loads((ROOT / "tests" / "compat" / "masking-v1.json").read_text())
PAGE = (ROOT / "docs" / "formats" / "masking.md").read_text()
ALMOST_THE_MEAN = pytest.approx(
    SPECIMEN["mean"], rel=1e-14, abs=0
)  # the last bits of float64 are no part of the format
STEPS = {"keys": "keys", "shares": "shares", "train": "masked", "agree": "signatures", "open": "opened"}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> tuple[Federation, MaskedMean]:
    """The attempt, by the library, from the secrets of the specimen."""
    monkeypatch.setattr(Job, "digest", lambda _: SPECIMEN["job"])  # which later fields of a job would change
    monkeypatch.setattr("tests.tg_tinker.federated.masking.parties.public", public)
    sites = SPECIMEN["sites"]
    job = make_job(list(sites), clip=SPECIMEN["clip"], bits=SPECIMEN["bits"])
    federation = Federation(job)
    for name, site in sites.items():
        secret = base64.b64decode(site["secret"])
        federation.sites[name] = MaskingSite(job, name, key(name), entropy=lambda _, secret=secret: secret)
    updates = {name: np.array(site["update"], np.float32) for name, site in sites.items()}
    place = {"round_": SPECIMEN["round"], "attempt": SPECIMEN["attempt"]}
    _, mean = federation.run(updates, **place, silent={"train": set(SPECIMEN["dropped"])})
    return federation, mean


def key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(base64.b64decode(SPECIMEN["sites"][name]["identity"]))


def public(name: str) -> str:
    if name not in SPECIMEN["sites"]:
        return base64.b64encode(bytes(range(32))).decode()
    return base64.b64encode(key(name).public_key().public_bytes_raw()).decode()


def messages(federation: Federation, step: str) -> dict[str, Any]:
    replies = {site: reply for done, site, _, reply in federation.seen if done == step}
    match step:
        case "shares":
            return {site: reply["shares"] for site, reply in replies.items()}
        case "train":
            return {site: reply.tolist() for site, reply in replies.items()}
        case "agree":
            return {site: reply["signature"] for site, reply in replies.items()}
    return replies


@pytest.mark.parametrize("step", STEPS)
def test_the_library_writes_what_the_specimen_has(played: tuple[Federation, MaskedMean], step: str) -> None:
    assert messages(played[0], step) == SPECIMEN[STEPS[step]]


def test_the_library_finds_the_mean_of_the_specimen(played: tuple[Federation, MaskedMean]) -> None:
    mean = played[1]
    assert mean.mean.tolist() == ALMOST_THE_MEAN
    assert (list(mean.stayed), list(mean.dropped)) == (SPECIMEN["stayed"], SPECIMEN["dropped"])
    updates = {n: np.array(SPECIMEN["sites"][n]["update"], np.float32) for n in SPECIMEN["stayed"]}
    bound = error_bound(SPECIMEN["clip"], SPECIMEN["bits"])
    assert np.abs(mean.mean - plain_mean(updates, clip=SPECIMEN["clip"])).max() <= bound


def test_the_reader_on_the_page_finds_the_same_from_the_secrets_alone() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    given = {k: v for k, v in SPECIMEN.items() if k not in {*STEPS.values(), "mean"}}
    found = names["replay"](given)
    assert set(found) == {*STEPS.values(), "mean"}
    for part, value in found.items():
        assert value == (ALMOST_THE_MEAN if part == "mean" else SPECIMEN[part]), part


def test_the_specimen_is_as_the_page_says() -> None:
    assert SPECIMEN["threshold"] == 3
    assert SPECIMEN["dropped"] == ["cedar"]
    values = [v for site in SPECIMEN["sites"].values() for v in site["update"]]
    assert max(values) > SPECIMEN["clip"]
    assert min(values) < -SPECIMEN["clip"]
    assert np.array(values, np.float32).tolist() == values


@pytest.mark.parametrize("row", ["*n*", "*t*", "in league, at most", "may drop"])
def test_the_table_of_thresholds(row: str) -> None:
    (sizes,), (shown,) = (re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", PAGE, re.M) for name in ("*n*", row))
    for n, value in zip(map(int, sizes.split("|")), map(int, shown.split("|")), strict=True):
        t = next(t for t in range(3, n + 1) if 3 * t >= 2 * n)
        assert value == {"*n*": n, "*t*": t, "in league, at most": min(2 * t - n - 1, t - 2), "may drop": n - t}[row]
