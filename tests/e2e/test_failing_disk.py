"""A step whose charge meets a failing disk releases nothing: no noise is drawn that is not paid for on disk."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import batch
from tests.support.log_tree import check_trees
from tests.support.recorded_disk import Fault, RecordedDisk
from tg_tinker import DPConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.errors import TGTinkerError
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.dp.mechanism import GaussianMechanism

CONFIG = TrainingConfig(
    model_ref="bigram", batch_size=4, dp_config=DPConfig(dataset_id="d", target_epsilon=None, noise_multiplier=5.0)
)


@contextmanager
def serving(folder: Path) -> Iterator[ServiceClient]:
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=folder)) as server:
        key = server.mint_key("tenant-a")
        with ServiceClient(base_url=server.address, api_key=key, timeout=30) as service:
            yield service


def charges_on_disk(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "tg-tinker.db")) as connection:
        return int(connection.execute("SELECT count(*) FROM ledger WHERE kind = 'charge'").fetchone()[0])


def loss(client: TrainingClient) -> float:
    """On a batch of its own: equal weights, equal loss."""
    client.eval()
    try:
        return float(client.forward_backward(batch(1)).result().loss)
    finally:
        client.train()


@dataclass
class Outcome:
    """Of one step: did it succeed, how often was noise drawn, how many operations were asked and failed?"""

    succeeded: bool
    draws: int
    asked: int
    failed: int


def step_on_a_failing_disk(folder: Path, fault: Fault, chosen: Container[int]) -> Outcome:
    """Train one step, then another under faults; then hold the server, and a new one, to what is promised."""
    draws = 0
    real = GaussianMechanism.add_noise_

    def paid_for(self: GaussianMechanism, arrays: Any) -> None:
        nonlocal draws
        draws += 1
        assert charges_on_disk(folder) >= 1 + draws, "noise was drawn before its charge was on disk"
        real(self, arrays)

    with RecordedDisk(folder) as disk, serving(folder) as service:
        client = service.create_training_client(CONFIG)
        client.forward_backward(batch(0)).result()
        client.optim_step().result()
        before = loss(client)
        client.forward_backward(batch(2)).result()
        while len(service.get_audit_logs(operation="forward_backward")) < 3:  # their lines follow the replies
            time.sleep(0.01)
        succeeded = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GaussianMechanism, "add_noise_", paid_for)
            disk.fail(fault, chosen.__contains__)
            with suppress(TGTinkerError):
                client.optim_step().result()
                succeeded = True
            disk.heal()
        asked, failed = len(disk.asked), len(disk.failed)
        with suppress(TGTinkerError):  # a server that lost a line of its audit log takes nothing more
            assert (loss(client) == before) != succeeded
    with serving(folder) as service:
        client = service.get_training_client(client.id)
        assert (loss(client) == before) != succeeded
        assert charges_on_disk(folder) >= 1 + draws
        client.forward_backward(batch(3)).result()
        assert client.optim_step().result().step == 2 + succeeded
    check_trees(folder / "tg-tinker.db")
    return Outcome(succeeded, draws, asked, failed)


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("fault", "for_ever"), [("EIO", False), ("ENOSPC", True)])
def test_a_step_releases_nothing_that_is_not_paid_for_on_disk(
    tmp_path: Path, fault: Fault, for_ever: bool, stride: int
) -> None:
    calm = step_on_a_failing_disk(tmp_path / "calm", fault, ())
    assert (calm.succeeded, calm.draws, calm.failed) == (True, 1, 0)
    outcomes = []
    for first in range(1, calm.asked + 1, stride):
        chosen = range(first, sys.maxsize) if for_ever else (first,)
        outcomes.append(step_on_a_failing_disk(tmp_path / str(first), fault, chosen))
        released = outcomes[-1].draws
        assert released == 1 if outcomes[-1].succeeded else released in (0, 1)
        # The line of the audit log follows the reply: the last operations may come after the step, or not at all.
        assert outcomes[-1].failed > 0 or (outcomes[-1].succeeded and first > calm.asked / 2)
    assert not outcomes[0].succeeded
    assert outcomes[0].draws == 0
    if stride == 1:
        assert any(not o.succeeded and o.draws == 0 for o in outcomes[5:])  # the flush of the charge failed
        assert any(not o.succeeded and o.draws == 1 for o in outcomes)  # paid, drawn, and never settled
