"""Masked rounds at real sites, each message in a fresh process: the sum comes out, single updates do not."""

from __future__ import annotations

import contextlib
import json
import stat

import numpy as np
import pytest

from tests.tg_tinker.federated.jobs import key_of
from tests.tg_tinker.federated.site_lab import ADAPTER, TEXTS, Crash, Party, Tripwire, site_job
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.masking import ARRAY, MaskingRound, error_bound
from tg_tinker.federated.updates import weights_digest
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

NAMES = ("site-0", "site-1", "site-2")
SIZE = 260 * 260
BOUND = 1.01 * error_bound(clip=1.0, bits=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path_factory.mktemp("server"))
    with EmbeddedServer(config) as server:
        yield server


@pytest.fixture
def parties(server, tmp_path):
    made = []
    for i, name in enumerate(NAMES):
        rules = {"require_record_privacy": False, "require_masking": True, "min_sites": 2, "public_units": 7}
        party = Party(
            server,
            tmp_path / name,
            name=name,
            policy=rules,
            api_key=server.mint_key(f"{tmp_path.name}-{name}".replace("_", "-")),
        )
        party.register(TEXTS[i::3], target_epsilon=None)
        made.append(party)
    return made


def masked_job(**changes):
    roster = {name: public_text(key_of(name)) for name in NAMES}
    return site_job(
        roster=roster, records=None, batch_size=7, min_sites=2, masking={"clip": 1.0, "bits": 20}, **changes
    )


def run(job, parties, *, attempt=1, wire=None):
    """One attempt at round 1; a wire kills the last site's process once, and it is asked again."""

    def ask(party, kind, **parts):
        parts = {"attempt": attempt, **parts}
        if wire is not None and party is parties[-1]:
            with contextlib.suppress(Crash):
                return party.ask(job, kind, 1, wire=wire, **parts)
        return party.ask(job, kind, 1, **parts)

    round_ = MaskingRound(job, 1, attempt, size=SIZE, base=weights_digest(ADAPTER))
    by_name = {party.name: party for party in parties}
    keys = round_.keys({p.name: ask(p, "mask.keys", facts=round_.begin()).facts for p in parties})
    shares = round_.shares({p.name: ask(p, "mask.shares", facts=keys).facts for p in parties})
    trained = {name: ask(by_name[name], "train", facts=facts, arrays=ADAPTER) for name, facts in shares.items()}
    stayed = round_.masked({name: reply.arrays[ARRAY] for name, reply in trained.items()})
    agreed = round_.agreed({name: ask(by_name[name], "mask.agree", facts=stayed).facts for name in stayed["stayed"]})
    opened = {name: ask(by_name[name], "mask.open", facts=agreed).facts for name in agreed["signatures"]}
    return round_.opened(opened), trained


def plain(party, job):
    with party.state() as state:
        return state.update(job.digest(), 1)["table"].ravel()


def test_the_coordinator_gets_the_mean_and_no_update(parties):
    job = masked_job()
    for party in parties:
        party.join(job)
    mean, trained = run(job, parties)
    updates = [plain(party, job) for party in parties]
    assert all(float(np.abs(u).max()) > 0.01 for u in updates)
    np.testing.assert_allclose(mean.mean, np.mean(updates, axis=0), atol=BOUND)
    for reply in trained.values():
        assert reply.facts == {}
        assert list(reply.arrays) == [ARRAY]
        assert reply.arrays[ARRAY].dtype == np.uint32
        # Uniform over 32 bits: mean and spread as of noise, whatever the update.
        values = reply.arrays[ARRAY].astype(np.float64) / 2**32
        assert abs(values.mean() - 0.5) < 0.01
        assert abs(values.std() - 12**-0.5) < 0.01


def test_secrets_are_readable_by_the_owner_alone_and_gone_after_opening(parties):
    job = masked_job()
    for party in parties:
        party.join(job)
    path = parties[0].folder / "state" / "masking" / f"{job.digest()}.json"
    parties[0].ask(job, "mask.keys", 1, facts={"base": weights_digest(ADAPTER)})
    secret = json.loads(path.read_text())["secret"]
    assert secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    run(job, parties)
    after = path.read_text()
    assert secret not in after
    assert json.loads(after)["secret"] is None
    assert json.loads(after)["received"] is None
    parties[0].ask(job, "finish")
    assert not path.exists()


def test_a_site_that_dies_between_any_two_steps_goes_on(parties):
    job = masked_job()
    for party in parties:
        party.join(job)
    run(job, parties)
    updates = [plain(party, job) for party in parties]
    wire = Tripwire()
    run(job, parties, attempt=2, wire=wire)
    points = [i for i, name in enumerate(wire.passed) if "masking" in name]
    assert len(points) == 12  # before and after each of six writes: five requests, of which "train" writes twice
    for attempt, at in enumerate(points[::3], start=3):
        mean, _ = run(job, parties, attempt=attempt, wire=Tripwire(at=at))
        assert mean.stayed == NAMES
        np.testing.assert_allclose(mean.mean, np.mean(updates, axis=0), atol=BOUND)
    with parties[0].service() as service:
        assert len(service.get_privacy_ledger("data").charges) == job.local_steps  # trained once


def test_a_repeated_masked_update_is_the_same_bytes(parties):
    job = masked_job()
    for party in parties:
        party.join(job)
    round_ = MaskingRound(job, 1, 1, size=SIZE, base=weights_digest(ADAPTER))
    keys = round_.keys({p.name: p.ask(job, "mask.keys", 1, facts=round_.begin()).facts for p in parties})
    shares = round_.shares({p.name: p.ask(job, "mask.shares", 1, facts=keys).facts for p in parties})
    request = parties[0].request(job, "train", 1, facts=shares["site-0"], arrays=ADAPTER)
    assert parties[0].handle(request).signature == parties[0].handle(request).signature


def test_an_update_without_masks_is_never_sent(parties):
    job = masked_job()
    party = parties[0]
    party.join(job)
    for facts in ({}, {"shares": {}}):
        reply = party.ask(job, "train", 1, facts=facts, arrays=ADAPTER)
        assert dict(reply.arrays) == {}
        assert reply.facts["refused"] in ("wrong_round", "masking")
    assert party.charges() == 0  # refused before training


def test_sites_that_are_given_different_models_train_none(parties):
    """From weights of 1e30 an update is zero in float32: the sum would be that of the site with the true model."""
    job = masked_job()
    for party in parties:
        party.join(job)
    lie = {name: np.full_like(value, 1e30) for name, value in ADAPTER.items()}
    bases = [weights_digest(ADAPTER), weights_digest(lie), weights_digest(lie)]
    keys = {
        p.name: dict(p.ask(job, "mask.keys", 1, facts={"base": base}).facts)
        for p, base in zip(parties, bases, strict=True)
    }
    for party in parties:
        reply = party.ask(job, "mask.shares", 1, facts={"keys": keys})
        assert reply.facts["refused"] == "masking"
        assert "other weights to begin with" in reply.facts["message"]
    round_ = MaskingRound(job, 1, 2, size=SIZE, base=bases[0])
    request = round_.keys(
        {p.name: p.ask(job, "mask.keys", 1, attempt=2, facts=round_.begin()).facts for p in parties}
    )
    shares = round_.shares({p.name: p.ask(job, "mask.shares", 1, attempt=2, facts=request).facts for p in parties})
    reply = parties[1].ask(job, "train", 1, attempt=2, facts=shares["site-1"], arrays=lie)
    assert reply.facts["refused"] == "masking"
    assert dict(reply.arrays) == {}
    with parties[1].state() as state:
        assert state.round(job.digest(), 1) is None  # nothing began


def test_a_sum_over_fewer_sites_than_the_job_names_is_not_agreed_to(parties):
    job = masked_job()
    for party in parties:
        party.join(job)
    reply = parties[0].ask(job, "mask.agree", 1, facts={"stayed": ["site-0"]})
    assert reply.facts["refused"] == "too_few_sites"
    assert "at least 2" in reply.facts["message"]
    parties[0].policy["min_sites"] = 3  # the policy was tightened: the job is refused as a whole
    assert parties[0].ask(job, "mask.keys", 1).facts["refused"] == "policy"
