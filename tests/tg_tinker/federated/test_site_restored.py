"""A site whose server or state folder was put back from a backup: nothing is signed or trained that hides a step."""

from __future__ import annotations

import shutil
import socket

import numpy as np
import pytest

from tests.tg_tinker.federated.site_lab import ADAPTER, Crash, Party, Tripwire, moved, site_job
from tg_tinker.errors import LogVerificationError
from tg_tinker.federated.site import FAILED
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

LOOSE = {"target_epsilon": 1000.0}  # of the data: only the job's own target holds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("pinned", [True, False])
def test_nothing_is_signed_on_a_server_that_was_put_back(tmp_path, monkeypatch, pinned):
    """By the pinned log; and where the pins are lost too, by what the state folder knows of."""
    config = ServerConfig(port=free_port(), backend="bigram", data_dir=tmp_path / "server")
    job, weights = site_job(rounds=3), ADAPTER
    with EmbeddedServer(config) as server:
        party = Party(server, tmp_path / "site")
        party.register(**LOOSE)
        party.join(job)
        weights = moved(weights, party.ask(job, "train", 1, arrays=weights).arrays)
    shutil.copytree(config.data_dir, tmp_path / "backup")
    with EmbeddedServer(config) as party.server:
        weights = moved(weights, party.ask(job, "train", 2, arrays=weights).arrays)
        assert party.charges() == 4
    shutil.rmtree(config.data_dir)
    shutil.copytree(tmp_path / "backup", config.data_dir)
    if not pinned:
        monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "fresh"))
    with EmbeddedServer(config) as party.server:
        reply = party.ask(job, "finish")
        assert reply.facts["refused"] == FAILED
        assert party.ask(job, "train", 3, arrays=weights).facts["refused"] in (FAILED, "wrong_round")
        if pinned:
            with party.service() as service:
                for question in (service.get_privacy_ledger, service.get_signed_report):
                    with pytest.raises(LogVerificationError):
                        question(party.dataset)
    with party.state() as state:
        assert state.statement(job.digest()) is None
    log = (tmp_path / "site" / "state" / "site.log").read_text()
    assert ("LogVerificationError" if pinned else "this site knows of 4") in log


@pytest.fixture
def party(tmp_path):
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "server")
    with EmbeddedServer(config) as server:
        party = Party(server, tmp_path / "site")
        party.register(**LOOSE)
        yield party


def test_a_site_without_its_state_joins_no_job_again(party):
    job = site_job()
    party.join(job)
    party.ask(job, "train", 1, arrays=ADAPTER)
    shutil.rmtree(party.folder / "state")
    reply = party.ask(job, "join", facts={"job": job.model_dump(mode="json")})
    assert reply.facts["refused"] == "policy"
    assert "start a new job" in reply.facts["message"]
    assert party.ask(job, "train", 1, arrays=ADAPTER).facts["refused"] == "policy"
    assert party.charges() == 2
    party.join(site_job(job_id="another"))


def test_a_run_of_the_job_is_memory_enough(party):
    """A site that died before it noted its agreement trained all the same."""
    job = site_job()

    class Wire(Tripwire):
        def point(self, name):
            if name == "before note_federation":
                raise Crash

    with pytest.raises(Crash):
        party.ask(job, "join", facts={"job": job.model_dump(mode="json")}, wire=Wire())
    party.ask(job, "train", 1, arrays=ADAPTER)
    assert party.audit("federation.join_accepted") == []
    shutil.rmtree(party.folder / "state")
    reply = party.ask(job, "join", facts={"job": job.model_dump(mode="json")})
    assert reply.facts["refused"] == "policy"
    assert party.charges() == 2


def test_a_state_from_before_a_round_trains_nothing_again(party):
    job = site_job(rounds=3)
    party.join(job)
    weights = moved(ADAPTER, party.ask(job, "train", 1, arrays=ADAPTER).arrays)
    state, backup = party.folder / "state", party.folder / "backup"
    shutil.copytree(state, backup)
    party.ask(job, "train", 2, arrays=weights)
    before = party.charges()
    shutil.rmtree(state)
    shutil.copytree(backup, state)
    other = moved(weights, {"table": np.full((260, 260), 1e-3, np.float32)})
    reply = party.ask(job, "train", 2, arrays=other)
    assert reply.facts["refused"] == "policy"
    assert "old copy" in reply.facts["message"]
    assert party.charges() == before == 4
    said = party.statement(job)
    assert said.rounds == (1, 2)  # what the audit log has
    assert float(said.epsilon) >= party.epsilon_of_all() > 0


def test_a_state_from_before_any_round_counts_every_run_of_the_job(party):
    """Its run is not even known to the state; the ledger has its charges, and the run its mark."""
    job = site_job(rounds=2)
    party.join(job)
    state, backup = party.folder / "state", party.folder / "backup"
    shutil.copytree(state, backup)
    party.ask(job, "train", 1, arrays=ADAPTER)
    for deleted in (False, True):
        if deleted:
            with party.service() as service:
                for info in service.list_training_clients():
                    service.delete_training_client(info.id)
        shutil.rmtree(state)
        shutil.copytree(backup, state)
        assert party.ask(job, "train", 1, arrays=ADAPTER).facts["refused"] == "policy", deleted
    assert party.charges() == 2
    said = party.statement(job)
    assert said.rounds == (1,)
    assert float(said.epsilon) >= party.epsilon_of_all() > 0
