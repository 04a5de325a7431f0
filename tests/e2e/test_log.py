"""The log as a user meets it: receipts with every step, and a server whose history is not what it was is refused."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import batch
from tg_tinker import DPConfig, OptimizerConfig, ServiceClient, TrainingConfig
from tg_tinker.errors import LogVerificationError
from tg_tinker.transparency import merkle
from tg_tinker.transparency.note import Checkpoint, VerifierKey
from tg_tinker.transparency.pins import Pins
from tg_tinker.transparency.receipts import Receipts
from tg_tinker.wire.log import checkpoint_request, log_entries_request
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

CONFIG = TrainingConfig(
    model_ref="bigram",
    optimizer=OptimizerConfig(learning_rate=0.01),
    dp_config=DPConfig(dataset_id="data-1", noise_multiplier=5.0, target_epsilon=1e6),
    batch_size=2,
)


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "user"))
    return tmp_path / "user"


class Site:
    """A server's folder, and the port and key it keeps while folders come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.key = folder, 0, ""
        self.server: EmbeddedServer | None = None

    def up(self) -> Site:
        self.server = EmbeddedServer(ServerConfig(port=self.port, backend="bigram", data_dir=self.folder)).start()
        self.port = int(self.server.address.rpartition(":")[2])
        self.key = self.key or self.server.mint_key()
        return self

    def down(self) -> None:
        assert self.server is not None
        self.server.stop(grace_s=1.0)

    def client(self, **more: Any) -> ServiceClient:
        return ServiceClient(api_key=self.key, base_url=f"127.0.0.1:{self.port}", **more)

    def train(self, steps: int, service: ServiceClient | None = None, config: TrainingConfig = CONFIG) -> list[Any]:
        with service or self.client() as client:
            tc = client.create_training_client(config)
            done = []
            for n in range(steps):
                tc.forward_backward(batch(n))
                done.append(tc.optim_step().result(timeout=60))
            return done


@pytest.fixture
def site(tmp_path: Path) -> Any:
    site = Site(tmp_path / "server").up()
    yield site
    site.down()


def test_every_paid_step_comes_with_a_receipt_that_the_user_keeps(site: Site) -> None:
    done = site.train(3)
    (pinned,) = [p for s in Pins.of_user().servers() if (p := Pins.of_user().get(s.origin))]
    kept = Receipts.of_user().read_all(pinned.checkpoint.origin, "data-1")
    assert len(kept) == 3
    for result, receipt in zip(done, kept, strict=True):
        assert receipt.verify(pinned.key).size == receipt.leaf_index + 1
        assert receipt.body["kind"] == "charge"
        assert float(receipt.body["epsilon_after"]) == result.dp_metrics.total_epsilon
        assert result.receipt.entry_json == receipt.entry
    # A second answer: the whole log, leaf by leaf, has the pinned root.
    with site.client() as service:
        leaves: list[str] = []
        while page := service._transport.call(log_entries_request(len(leaves), 7)).entries_json:
            leaves += page
        (state,) = service._transport.call(checkpoint_request([0])).states
    newest = Checkpoint.open(state.checkpoint, VerifierKey.parse(state.verifier_key))
    hashes = [merkle.leaf_hash(leaf.encode()) for leaf in leaves]
    assert merkle.root_of(hashes[: newest.size]) == newest.root
    assert merkle.root_of(hashes[: pinned.checkpoint.size]) == pinned.checkpoint.root
    assert leaves[kept[1].leaf_index] == kept[1].entry


def test_steps_in_flight_together_are_all_held_to_one_history(site: Site) -> None:
    with site.client() as service:
        clients = [service.create_training_client(CONFIG) for _ in range(3)]
        futures = []
        for n in range(6):
            for tc in clients:
                tc.forward_backward(batch(n))
                futures.append(tc.optim_step())
        sizes = [
            Checkpoint.parse(f.result(timeout=60).receipt.log.checkpoint.split("\n\n")[0] + "\n").size
            for f in futures
        ]
        assert len(set(sizes)) == 18
        assert service.check_log() >= max(sizes)


def test_a_run_without_privacy_has_no_receipt(site: Site) -> None:
    (result,) = site.train(1, config=CONFIG.model_copy(update={"dp_config": None}))
    assert result.receipt is None


def test_a_restart_is_no_rollback(site: Site) -> None:
    with site.client(timeout=60) as service:
        tc = service.create_training_client(CONFIG)
        tc.forward_backward(batch(0))
        tc.optim_step().result(timeout=60)
        site.down()
        site.up()
        tc.forward_backward(batch(1))
        assert tc.optim_step().result(timeout=60).step == 2


def restore(site: Site, kept: Path) -> None:
    site.down()
    shutil.rmtree(site.folder)
    shutil.copytree(kept, site.folder)
    site.up()


def snapshot(site: Site, at: Path) -> Path:
    site.down()
    shutil.copytree(site.folder, at)
    site.up()
    return at


def refused(call: Callable[[], Any]) -> LogVerificationError:
    with pytest.raises(LogVerificationError) as caught:
        call()
    return caught.value


def test_an_old_database_put_back_is_refused_by_every_client_that_saw_more(site: Site, tmp_path: Path) -> None:
    site.train(1)
    old = snapshot(site, tmp_path / "old")
    site.train(2)
    restore(site, old)
    error = refused(lambda: site.train(1))
    assert error.kind == "rolled_back"
    assert "rolled back" in error.message
    assert refused(lambda: site.client().check_log()).kind == "rolled_back"


def test_an_old_database_that_grew_past_what_was_seen_is_a_fork(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.train(1)
    old = snapshot(site, tmp_path / "old")
    site.train(1)
    restore(site, old)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "another user"))
        site.train(8)
    assert refused(lambda: site.train(1)).kind == "forked"


def test_a_handle_in_use_notices_the_old_database_before_it_sends_anything(site: Site, tmp_path: Path) -> None:
    with site.client(timeout=60) as service:
        tc = service.create_training_client(CONFIG)
        tc.forward_backward(batch(0))
        tc.optim_step().result(timeout=60)
        old = snapshot(site, tmp_path / "old")
        for n in (1, 2):
            tc.forward_backward(batch(n))
            tc.optim_step().result(timeout=60)
        restore(site, old)
        future = tc.forward_backward(batch(3))
        assert refused(lambda: future.result(timeout=60)).kind == "rolled_back"
        assert refused(tc.optim_step).kind == "rolled_back"
    assert site.server is not None
    with sqlite3.connect(site.folder / "tg-tinker.db") as db:
        charges = [json.loads(b) for (b,) in db.execute("SELECT body_json FROM ledger WHERE kind = 'charge'")]
    assert len(charges) == 1


def rewrite(folder: Path, draw: random.Random) -> None:
    """Change one entry and everything that follows from it, as somebody with the database would."""
    with sqlite3.connect(folder / "tg-tinker.db") as db:
        for table in ("ledger", "log_nodes"):
            db.execute(f"DROP TRIGGER {table}_no_update")
        size = db.execute("SELECT MAX(idx) + 1 FROM log_nodes WHERE level = 0 AND tenant = 'default'").fetchone()[0]
        charges = db.execute("SELECT leaf_index, body_json FROM ledger WHERE kind = 'charge'").fetchall()
        at, body = draw.choice(charges)
        db.execute("UPDATE ledger SET body_json = ? WHERE leaf_index = ?", (body.replace("5.0", "9.0"), at))
        leaves = dict(
            db.execute("SELECT leaf_index, body_json FROM ledger UNION SELECT leaf_index, body_json FROM audit")
        )
        hashes = [merkle.leaf_hash(leaves[i].encode()) for i in range(size)]
        for level, idx in db.execute("SELECT level, idx FROM log_nodes WHERE tenant = 'default'").fetchall():
            value = merkle.root_of(hashes[idx << level : (idx + 1) << level])
            db.execute(
                "UPDATE log_nodes SET hash = ? WHERE tenant = 'default' AND level = ? AND idx = ?",
                (value, level, idx),
            )


def attack_often(site: Site, tmp_path: Path, times: int) -> list[str]:
    """Restore or rewrite again and again; what the client said each time."""
    draw, kinds = random.Random(5), []
    site.train(1)
    old = snapshot(site, tmp_path / "old")
    site.train(draw.randrange(1, 4))
    newest = snapshot(site, tmp_path / "new")
    for _ in range(times):
        site.down()
        shutil.rmtree(site.folder)
        forge = draw.random() < 0.5
        shutil.copytree(newest if forge else old, site.folder)
        if forge:
            rewrite(site.folder, draw)
        site.up()
        kinds.append(refused(lambda: site.client(retry_count=0).create_training_client(CONFIG)).kind)
    restore(site, newest)
    site.train(1)  # the true one is still welcome
    return kinds


def test_a_restored_or_rewritten_server_is_refused_each_time(site: Site, tmp_path: Path) -> None:
    kinds = attack_often(site, tmp_path, 6)
    assert set(kinds) == {"rolled_back", "forked"}


@pytest.mark.slow
def test_a_restored_or_rewritten_server_is_refused_a_hundred_times_of_a_hundred(site: Site, tmp_path: Path) -> None:
    kinds = attack_often(site, tmp_path, 100)
    assert len(kinds) == 100
    assert min(kinds.count("rolled_back"), kinds.count("forked")) > 30


def test_a_server_that_withholds_or_swaps_a_receipt_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from tg_tinker_server.service.log import LogService

    honest = LogService.receipt
    kept: list[Any] = []

    async def swapped(self: LogService, paid: Any, known: int) -> Any:
        kept.append(await honest(self, paid, known))
        return kept[0]

    async def withheld(self: LogService, paid: Any, known: int) -> Any:
        return None

    for fault in (swapped, withheld):
        kept.clear()
        monkeypatch.setattr(LogService, "receipt", fault)
        assert refused(lambda: site.train(2)).kind == "bad_proof"
