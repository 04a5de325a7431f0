"""Real processes: a SuperLink over TLS for registered nodes only, SuperNodes, executors that run our app only."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.cli.build import build_fab_from_files
from flwr.supercore.constant import TaskType

from tests.tg_tinker.federated.flower.federation import Federation, wait_until
from tests.tg_tinker.federated.flower.toy import train
from tg_tinker.errors import FederationRefusedError, InvalidRequestError, ServerError
from tg_tinker.federated.flower import internals
from tg_tinker.federated.flower.certificates import make_authority, make_node_key
from tg_tinker.federated.flower.internals import Endpoint, Tasks
from tg_tinker.federated.flower.superlink import SuperLink
from tg_tinker.federated.flower.supernode import SuperNode
from tg_tinker.federated.link import CoordinatorLink

NAMES = ("berlin", "oslo")


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path, NAMES)
    try:
        yield made
    finally:
        made.stop()


def everybody(link: CoordinatorLink, timeout_s: float = 120.0) -> None:
    """Wait for all sites."""
    assert wait_until(lambda: len(link.sites()) == len(NAMES), timeout_s), link.sites()


def rounds(link: CoordinatorLink, federation: Federation, *numbers: int, timeout_s: float = 120.0) -> None:
    """Exchange good replies with all sites."""
    for number in numbers:
        requests = [train(name, federation.key, round_=number, value=float(number)) for name in NAMES]
        outcomes = link.exchange(requests, timeout_s=timeout_s)
        assert [o.failure for o in outcomes] == ["", ""]
        for outcome in outcomes:
            assert outcome.reply is not None
            assert outcome.reply.facts == {"site": outcome.site}
            np.testing.assert_array_equal(outcome.reply.arrays["w"], np.full(3, -number, "<f4"))


def hostile_bundle(monkeypatch: pytest.MonkeyPatch, marker: Path) -> None:
    """Runs bring code along that leaves a mark wherever it is imported."""
    build = build_fab_from_files
    code = f"open({str(marker)!r}, 'w').close()\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"

    def with_code(files: dict[str, bytes]) -> object:
        project = files["pyproject.toml"].replace(b"tg_tinker.federated.flower.apps:site_app", b"hostile:app")
        project = project.replace(b"tg_tinker.federated.flower.apps:coordinator_app", b"hostile:app")
        assert project.count(b"hostile:app") == 2
        return build({"pyproject.toml": project, "hostile.py": code.encode()})

    monkeypatch.setattr(internals, "build_fab_from_files", with_code)


def status(federation: Federation, path: str, headers: dict[str, str]) -> int:
    context = ssl.create_default_context(cafile=str(federation.folder / "ca.crt"))
    connection = http.client.HTTPSConnection("127.0.0.1", federation.port, timeout=10, context=context)
    try:
        connection.request("POST", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_two_sites_over_tls_and_all_that_is_turned_away(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = federation.folder / "marker"
    hostile_bundle(monkeypatch, marker)
    make_authority(federation.folder / "other.crt", federation.folder / "other.key")
    make_node_key(federation.folder / "stranger.key")
    for name in NAMES:
        federation.start(name)
    with SuperLink(federation.coordinator()) as link:
        own = federation.site("berlin").model_copy(update={"state_dir": federation.folder / "elsewhere"})
        deceived = SuperNode(own.model_copy(update={"root_certificates": federation.folder / "other.crt"}))
        stranger = SuperNode(
            own.model_copy(
                update={"node_key": federation.folder / "stranger.key", "state_dir": federation.folder / "third"}
            )
        )
        deceived.program.start()
        stranger.program.start()

        def run(to_sites: CoordinatorLink) -> str:
            everybody(to_sites)
            rounds(to_sites, federation, 1)
            crash, good = train("oslo", federation.key, kind="crash"), train("oslo", federation.key, round_=2)
            outcomes = to_sites.exchange([crash, good], timeout_s=120)
            assert [o.failure for o in outcomes] == ["its app failed (ValueError)", ""]
            return "done"

        assert link.run(run, roster=federation.roster, key=federation.key) == "done"
        assert not marker.exists()

        with pytest.raises(InvalidRequestError, match="does not vouch for"):
            deceived.wait_connected(20)
        with pytest.raises(FederationRefusedError, match=r"stranger.key.pub under flower.node_keys") as refused:
            stranger.wait_connected(20)
        assert refused.value.details["reason"] == "unknown_site"

        # Whoever is not on this computer reaches what sites need, and neither runs nor tasks.
        far = {"X-Forwarded-For": "203.0.113.9"}
        assert status(federation, "/v1/control/list-runs", far) == 403
        assert status(federation, "/v1/runtime/acquire-task", far) == 403
        assert status(federation, "/v1/control/list-runs", {}) != 403
        assert status(federation, "/v1/fleet/activate-node", far) not in (403, 404)
        wrong = Endpoint(address=link.address, secret=b"guessed", root_certificates=link._endpoint.root_certificates)
        with pytest.raises(ServerError, match="gives out no tasks"):
            Tasks(wrong, TaskType.SERVER_APP).next()
        with pytest.raises(ServerError, match="cannot be listened on"), SuperLink(federation.coordinator()):
            pass

        assert all("connected to the SuperLink" in federation.said(name) for name in NAMES)
        # However a site ends, its SuperNode ends with it.
        assert len(federation.programs("berlin")) == len(federation.programs("oslo")) == 1
        federation.processes["berlin"].send_signal(signal.SIGINT)
        federation.processes["oslo"].kill()
        if not wait_until(lambda: federation.processes["berlin"].poll() is not None, 20):
            federation.processes["berlin"].send_signal(signal.SIGINT)  # Python may lose one that comes in a finalizer
        assert wait_until(lambda: not federation.programs("berlin") + federation.programs("oslo"), 90)
        assert federation.processes["berlin"].wait(60) != 0
        deceived.program.stop()
        stranger.program.stop()
    assert not federation.programs()


def test_what_the_children_are_given_holds_none_of_our_secrets(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TG_TINKER_API_KEY", "tgk_secret")
    monkeypatch.setenv("TG_TINKER_SITE_CONFIG", "/etc/site.toml")
    node = SuperNode(federation.site("berlin"))
    node.program.start()
    try:
        given = Path(f"/proc/{node.program.pid}/environ")
        assert wait_until(lambda: b"FLWR_TELEMETRY_ENABLED=0" in given.read_bytes(), 60)
        assert b"TG_TINKER" not in given.read_bytes()
        line = Path(f"/proc/{node.program.pid}/cmdline").read_bytes()
        assert node.endpoint.secret not in line
    finally:
        node.program.stop()
    assert not federation.programs()


def test_files_that_are_missing_are_named_before_anything_starts(federation: Federation) -> None:
    gone = federation.folder / "gone"
    for name in ("root_certificates", "node_key"):
        with pytest.raises(InvalidRequestError, match=f"flower.{name}: there is no file"):
            SuperNode(federation.site("oslo").model_copy(update={name: gone}))
    for name in ("ca", "certificate", "key"):
        with pytest.raises(InvalidRequestError, match=f"flower.{name}: there is no file"):
            SuperLink(federation.coordinator().model_copy(update={name: gone}))
    assert not federation.programs()


@pytest.mark.slow
def test_a_supernode_may_be_run_by_somebody_else(federation: Federation) -> None:
    elsewhere = SuperNode(federation.site("oslo"))
    secret = federation.folder / "oslo" / "flower" / "tasks.secret"
    theirs = federation.site("oslo").model_copy(
        update={
            "supernode": elsewhere.endpoint.address,
            "tasks_secret": secret,
            "node_key": federation.folder / "none",
        }
    )
    (federation.folder / "oslo" / "site.json").write_text(theirs.model_dump_json(), encoding="utf-8")
    for name in NAMES:
        federation.start(name)
    try:
        with SuperLink(federation.coordinator()) as link:
            elsewhere.program.start()
            assert elsewhere.wait_connected(40) == elsewhere.number

            def run(to_sites: CoordinatorLink) -> None:
                everybody(to_sites)
                rounds(to_sites, federation, 1)

            link.run(run, roster=federation.roster, key=federation.key)
            assert federation.programs("oslo") == [elsewhere.program.pid]
    finally:
        elsewhere.program.stop()


@pytest.mark.slow
def test_killed_supernodes_and_superlinks_come_back(federation: Federation) -> None:
    for name in NAMES:
        federation.start(name)
    with SuperLink(federation.coordinator()) as link:

        def first(to_sites: CoordinatorLink) -> None:
            everybody(to_sites)
            rounds(to_sites, federation, 1)
            (pid,) = federation.programs("oslo")
            os.kill(pid, signal.SIGKILL)
            requests = [train(name, federation.key, round_=2) for name in NAMES]
            started = time.monotonic()
            outcomes = to_sites.exchange(requests, timeout_s=200)
            assert outcomes[0].failure == ""
            if outcomes[1].failure:
                assert outcomes[1].failure.startswith("its SuperNode is gone")
            assert time.monotonic() - started < 195
            everybody(to_sites)
            rounds(to_sites, federation, 3)

        link.run(first, roster=federation.roster, key=federation.key)
        assert link.program.pid is not None

        def second(to_sites: CoordinatorLink) -> None:
            os.kill(link.program.pid or 0, signal.SIGKILL)
            rounds(to_sites, federation, 4)

        started = time.monotonic()
        with pytest.raises(ServerError, match="flower-superlink ended"):
            link.run(second, roster=federation.roster, key=federation.key)
        assert time.monotonic() - started < 110
    with SuperLink(federation.coordinator()) as link:

        def third(to_sites: CoordinatorLink) -> None:
            everybody(to_sites)
            rounds(to_sites, federation, 5)

        link.run(third, roster=federation.roster, key=federation.key)


def test_a_certificate_that_does_not_fit_is_said_at_the_start(federation: Federation) -> None:
    make_authority(federation.folder / "other.crt", federation.folder / "other.key")
    settings = federation.coordinator().model_copy(update={"ca": federation.folder / "other.crt"})
    with pytest.raises(InvalidRequestError, match="does not vouch for"), SuperLink(settings):
        pass
    assert not federation.programs()
