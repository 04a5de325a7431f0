"""Whole jobs over Flower, real servers at both ends: in one process, and by the commands that people type."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.tg_tinker.federated.coordinating import KEY, coordinator, link_to
from tests.tg_tinker.federated.flower.federation import Federation, wait_until
from tests.tg_tinker.federated.site_lab import TEXTS, Party
from tg_tinker import ServiceClient
from tg_tinker.data import collate
from tg_tinker.federated.adapter_store import AdapterStore
from tg_tinker.federated.flower.apps import client_app, server_app
from tg_tinker.federated.flower.in_process import InProcessGrid
from tg_tinker.federated.flower.superlink import SuperLink
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.link import CoordinatorLink
from tg_tinker.federated.result import FederatedResult
from tg_tinker.federated.statement import verify_statement
from tg_tinker.types import TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

NAMES = ("site-0", "site-1")
SGD = {"name": "sgd", "learning_rate": 0.5, "momentum": 0.0, "nesterov": False}
ROUNDS = 2
PLAIN = {"sites": 2, "records": None, "batch_size": 4, "rounds": ROUNDS, "optimizer": SGD}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "server")) as running:
        yield running


@pytest.fixture
def service(server: EmbeddedServer) -> Iterator[ServiceClient]:
    with ServiceClient(server.mint_key("coordinator"), server.address) as client:
        yield client


def parties(server: EmbeddedServer, folder: Path) -> list[Party]:
    """Two sites with four texts each."""
    found = []
    for place, name in enumerate(NAMES):
        policy = {"require_record_privacy": False, "max_local_steps": 10}
        key = server.mint_key(f"tenant-{folder.name}-{name}")
        party = Party(server, folder / name, name=name, policy=policy, api_key=key)
        party.register(TEXTS[4 * place : 4 * place + 4], target_epsilon=None)
        found.append(party)
    return found


def central(service: ServiceClient) -> np.ndarray:
    """What one owner of all eight texts comes to, without any federation."""
    run = service.create_training_client(TrainingConfig(model_ref="bigram", optimizer=SGD, batch_size=8))
    batch = collate(run.encode_batch(TEXTS[:8]))
    for _ in range(ROUNDS):
        run.forward_backward(batch).result()
        run.optim_step().result()
    return np.asarray(run.pull_weights().tensors["table"])


def test_a_job_over_flower_in_one_process_is_the_job_over_no_carrier_at_all(
    tmp_path: Path, server: EmbeddedServer, service: ServiceClient
) -> None:
    carried: list[FederatedResult] = []
    work = coordinator(tmp_path / "a", service, job=PLAIN)
    sites = parties(server, tmp_path / "carried")

    def run(link: CoordinatorLink) -> None:
        carried.append(work.run(link))

    with InProcessGrid({site.name: client_app(site.handle) for site in sites}) as grid:
        grid.serve(server_app(run, roster=work.prepare().roster, key=KEY, poll_s=0.02))
    direct = coordinator(tmp_path / "b", service, job=PLAIN).run(link_to(parties(server, tmp_path / "direct")))  # type: ignore[arg-type]
    assert carried[0].status == direct.status == "finished", carried[0].why
    assert carried[0].weights_digest == direct.weights_digest
    table = AdapterStore(service, carried[0].job).load(carried[0].artifact_id)["table"]
    np.testing.assert_allclose(table, central(service), atol=1e-6)


def write_configurations(federation: Federation, sites: list[Party], server: EmbeddedServer) -> None:
    """site.toml of each site, coordinator.toml; keys where they say."""
    pem = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    for site in sites:
        folder = federation.folder / site.name
        for name, content in (
            ("identity.key", site.key.private_bytes(*pem)),
            ("api.key", site.api_key.encode()),
        ):
            (folder / name).unlink(missing_ok=True)
            (folder / name).touch(0o600)
            (folder / name).write_bytes(content)
        (folder / "site.toml").write_text(f"""
            site = "{site.name}"
            server = "{server.address}"
            api_key_file = "api.key"
            dataset = "data"
            identity = "identity.key"
            state_dir = "state"
            [policy]
            coordinator = "{public_text(KEY)}"
            base_models = ["bigram"]
            max_record_tokens = 64
            require_record_privacy = false
            max_local_steps = 10
            [flower]
            superlink = "127.0.0.1:{federation.port}"
            root_certificates = "../ca.crt"
            node_key = "node.key"
            """)
    for name, content in (
        ("coordinator.key", KEY.private_bytes(*pem)),
        ("api.key", server.mint_key("coordinator").encode()),
    ):
        (federation.folder / name).touch(0o600)
        (federation.folder / name).write_bytes(content)
    roster = ", ".join(f'{site.name} = "{public_text(site.key)}"' for site in sites)
    (federation.folder / "coordinator.toml").write_text(f"""
        server = "{server.address}"
        api_key_file = "api.key"
        identity = "coordinator.key"
        state_dir = "state"
        [job]
        job_id = "protected"
        base_model = "bigram"
        rounds = 2
        batch_size = 2
        expires = 2100-01-01T00:00:00Z
        roster = {{ {roster} }}
        [flower]
        address = "127.0.0.1:{federation.port}"
        ca = "ca.crt"
        certificate = "server.pem"
        key = "server.key"
        [flower.node_keys]
        site-0 = "site-0/node.key.pub"
        site-1 = "site-1/node.key.pub"
        """)


@pytest.mark.slow
def test_the_commands_run_a_job_between_processes_that_is_the_job_over_no_carrier(
    tmp_path: Path, server: EmbeddedServer, service: ServiceClient
) -> None:
    (tmp_path / "f").mkdir()
    federation = Federation(tmp_path / "f", NAMES, key=KEY)
    sites = parties(server, tmp_path / "carried")
    with (
        ServiceClient(sites[0].api_key, server.address) as own,
        ServiceClient(sites[1].api_key, server.address) as other,
    ):
        for client in (own, other):
            client.create_dataset("protected", TEXTS[:20], target_epsilon=8.0, target_delta=1e-5)
    write_configurations(federation, sites, server)
    command = [sys.executable, "-m", "tg_tinker.cli", "federated"]

    def start(name: str) -> None:
        with (federation.folder / name / "site.log").open("ab") as log:
            federation.processes[name] = subprocess.Popen(
                [*command, "site", "--config", federation.folder / name / "site.toml"], stdout=log, stderr=log
            )

    try:
        for name in NAMES:
            start(name)
        # Without noise, two rounds between processes come to what one owner of everything comes to.
        work = coordinator(tmp_path / "a", service, job=PLAIN, join_timeout_s=60.0, pause_s=0.5)
        with SuperLink(federation.coordinator()) as link:
            carried = link.run(work.run, roster=work.prepare().roster, key=KEY)
        assert carried.status == "finished", (carried.why, carried.left)
        direct = coordinator(tmp_path / "b", service, job=PLAIN).run(link_to(parties(server, tmp_path / "direct")))  # type: ignore[arg-type]
        assert carried.weights_digest == direct.weights_digest

        # With protection, all by command; the sites were restarted on other data.
        for name in NAMES:
            federation.processes[name].send_signal(signal.SIGTERM)
            assert federation.processes[name].wait(20) == 0, federation.said(name)
            path = federation.folder / name / "site.toml"
            path.write_text(
                path.read_text().replace('"data"', '"protected"').replace("_privacy = false", "_privacy = true")
            )
            start(name)
        result = tmp_path / "result.json"
        done = subprocess.run(
            [*command, "coordinator", "--config", federation.folder / "coordinator.toml", "--result", result],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished: 2 rounds" in done.stdout
        protected = FederatedResult.model_validate_json(result.read_text())
        assert protected.status == "finished"
        assert set(protected.statements) == set(NAMES)
        for party in sites:
            stated = verify_statement(protected.statements[party.name], protected.job.roster[party.name])
            assert stated.rounds == (1, 2)
            assert 0 < stated.epsilon_spent <= 8.0
            party.dataset = "protected"
            assert party.charges() == 2
    finally:
        federation.stop()
    assert wait_until(lambda: not federation.programs(), 10)
