"""What happens to runs and data never lowers what was spent: random histories through the whole service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.server.rpc.raw_client import RawClient, batch
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, ResourceNotFoundError
from tg_tinker.proto.v1 import datasets_pb2, privacy_pb2, runs_pb2
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.types.records import Record
from tg_tinker.wire.calls import Load, Pass, Save, Step
from tg_tinker.wire.datasets import append_records
from tg_tinker.wire.privacy import ledger_from_proto
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

ROLES = ("trainer", "auditor", "budget_officer")
NAME = "notes"
ACTS = (
    "step", "step", "step", "save", "load", "copy", "second client", "unload", "delete run", "erase",
    "delete dataset", "register again", "raise", "restart",
)  # fmt: skip
ALWAYS = [(act, 0) for act in ("step", "save", "step", "restart", "load", "step")]
"""Lived in every run: chance may leave any act out."""


class House:
    """One server that every history shares, each as a tenant of its own."""

    def __init__(self, folder: Path) -> None:
        self.config = ServerConfig(port=0, backend="bigram", data_dir=folder)
        self.server = EmbeddedServer(self.config).start()
        self.tenants = 0

    def restart(self) -> None:
        self.server.stop()
        self.server = EmbeddedServer(self.config).start()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    found = House(tmp_path_factory.mktemp("house"))
    yield found
    found.server.stop()


class History:
    """One tenant with one dataset; checked after everything that happens."""

    def __init__(self, house: House, registered: bool, done: Counter[str]) -> None:
        house.tenants += 1
        self.house, self.registered, self.done = house, registered, done
        self.target, self.spent = 2.0, 0.0
        self.key = house.server.mint_key(f"t{house.tenants}", ROLES)
        self.client = RawClient(house.server.address, self.key)
        self.seqs: dict[str, int] = {}
        self.saved: list[str] = []
        if registered:
            self.register("upload-1")
        self.open()

    def register(self, upload: str) -> None:
        terms = {"privacy_unit": "datum", "target_epsilon": self.target, "target_delta": 1e-3}
        records = [(Record(text=f"text {i}").to_bytes(), i) for i in range(20)]
        self.client.send(
            datasets_pb2.CreateDatasetRequest(
                upload_id=upload, dataset_id=NAME, num_records=20, num_slots=20, **terms
            )
        )
        self.client.send(append_records(upload, 0, records))
        self.client.send(datasets_pb2.SealDatasetRequest(upload_id=upload))

    def open(self, checkpoint: str = "") -> None:
        dp = DPConfig(
            noise_multiplier=3.0, dataset_id=NAME, target_epsilon=self.target, target_delta=1e-3, sampling="poisson",
            dataset_size=None if self.registered else 20,
        )  # fmt: skip
        config = TrainingConfig(model_ref="bigram", batch_size=4, dp_config=dp)
        request = runs_pb2.CreateTrainingClientRequest(config_json=config.model_dump_json(), checkpoint_id=checkpoint)
        self.seqs[self.client.send(request).run_id] = 0

    def call(self, run: str, call: Any) -> Any:
        self.seqs[run] += 1
        state = self.client.call(run, self.seqs[run], call)
        if state.error is not None:
            raise state.error
        return state.result

    def act(self, what: str, which: int) -> None:
        run = list(self.seqs)[which % len(self.seqs)] if self.seqs else ""
        needs_run = what in ("step", "save", "load", "unload", "delete run")
        try:
            if not needs_run or run:
                getattr(self, {"raise": "raise_"}.get(what, what.replace(" ", "_")))(run)
                self.done[what] += 1
        except (DPBudgetExceededError, InvalidRequestError, ResourceNotFoundError):
            pass  # refused, which frees nothing either
        self.check()

    def step(self, run: str) -> None:
        self.call(run, Pass.drawn_from(NAME) if self.registered else batch(records=4))
        self.call(run, Step())

    def save(self, run: str) -> None:
        self.saved.append(self.call(run, Save()).artifact_id)

    def load(self, run: str) -> None:
        if self.saved:
            self.call(run, Load(artifact_id=self.saved[0]))

    def copy(self, _: str) -> None:
        self.open(self.saved[0] if self.saved else "")

    def second_client(self, _: str) -> None:
        self.open()

    def unload(self, run: str) -> None:
        self.client.send(runs_pb2.UnloadModelRequest(run_id=run))

    def delete_run(self, run: str) -> None:
        self.client.send(runs_pb2.DeleteTrainingClientRequest(run_id=run))
        del self.seqs[run]

    def erase(self, _: str) -> None:
        ids = self.client.send(datasets_pb2.ListRecordIdsRequest(dataset_id=NAME)).record_ids
        self.client.send(datasets_pb2.EraseRecordsRequest(dataset_id=NAME, record_ids=ids[:16]))

    def delete_dataset(self, _: str) -> None:
        self.client.send(datasets_pb2.DeleteDatasetRequest(dataset_id=NAME))

    def register_again(self, _: str) -> None:
        with pytest.raises(InvalidRequestError, match="has a ledger already"):
            self.register("upload-2")

    def raise_(self, _: str) -> None:
        target = self.target + 0.1
        self.client.send(datasets_pb2.RaiseBudgetRequest(dataset_id=NAME, target_epsilon=target, reason="because"))
        self.target = target

    def restart(self, _: str) -> None:
        self.house.restart()
        self.client = RawClient(self.house.server.address, self.key)
        for run in self.seqs:
            self.seqs[run] = self.client.send(runs_pb2.GetTrainingClientRequest(run_id=run)).next_seq - 1

    def check(self) -> None:
        ledger = ledger_from_proto(self.client.send(privacy_pb2.GetLedgerRequest(dataset_id=NAME)))
        ledger.verify()
        assert self.spent <= ledger.epsilon_spent <= ledger.target_epsilon == pytest.approx(self.target)
        paid = [float(e.body["epsilon_after"]) for e in ledger.charges]
        assert ledger.epsilon_spent == (paid[-1] if paid else 0.0)
        self.spent = ledger.epsilon_spent


def live(house: House, histories: int) -> None:
    done: Counter[str] = Counter()

    @settings(max_examples=histories, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.booleans(), st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 3)), min_size=3, max_size=12))
    @example(True, ALWAYS)
    @example(False, ALWAYS)
    def one(registered: bool, acts: list[tuple[str, int]]) -> None:
        history = History(house, registered, done)
        for what, which in acts:
            history.act(what, which)

    one()
    assert done["step"] > 0
    assert done["restart"] > 0


def test_no_history_of_runs_and_data_lowers_what_was_spent(house: House) -> None:
    live(house, 12)


@pytest.mark.slow
def test_none_of_a_thousand_histories_of_runs_and_data_lowers_what_was_spent(house: House) -> None:
    live(house, 1_000)
