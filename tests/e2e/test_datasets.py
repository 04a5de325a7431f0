"""Registered datasets over the real service: the server draws, the budget holds, what is erased is gone."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.server_process import batch, free_port
from tests.server.rpc.raw_client import RawClient
from tg_tinker import (
    AuthorizationError,
    Dataset,
    DPBudgetExceededError,
    DPConfig,
    InvalidRequestError,
    ResourceNotFoundError,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Pass, Position, Step
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.dp.mechanism import GaussianMechanism
from tg_tinker_server.engine.pending import PendingBatch
from tg_tinker_server.service import draws
from tg_tinker_server.service.draws import poisson_draw

ROLES = ("trainer", "auditor", "budget_officer")
TEXTS = [f"patient {i} has a cough" for i in range(40)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data", max_batch_records=16)
    with EmbeddedServer(config) as running:
        yield running


@pytest.fixture
def service(server: EmbeddedServer) -> Iterator[ServiceClient]:
    with ServiceClient(api_key=server.mint_key("a", ROLES), base_url=server.address) as client:
        yield client


class Draws:
    """The server's draws, on record or forced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[list[int]] = []
        self.asked: list[tuple[int, float]] = []
        self.forced: list[int] | None = None
        monkeypatch.setattr(draws, "poisson_draw", self)

    def __call__(self, slots: int, sample_rate: float) -> Any:
        self.asked.append((slots, sample_rate))
        drawn = poisson_draw(slots, sample_rate) if self.forced is None else np.array(self.forced, dtype=np.int64)
        self.made.append([int(s) for s in drawn])
        return drawn


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Draws:
    return Draws(monkeypatch)


def run_on(service: ServiceClient, ds: Dataset, batch_size: int = 4, **overrides: Any) -> TrainingClient:
    overrides = {"noise_multiplier": 2.0, **overrides}
    config = TrainingConfig(model_ref="bigram", batch_size=batch_size, dp_config=ds.dp_config(**overrides), seed=1)
    return service.create_training_client(config)


def charges(service: ServiceClient, dataset_id: str) -> list[dict[str, Any]]:
    ledger = service.get_privacy_ledger(dataset_id)
    ledger.verify()
    return [dict(e.body) for e in ledger.charges]


def test_a_step_on_a_registered_dataset_is_charged_as_drawn_by_the_server(service: ServiceClient) -> None:
    ds = service.create_dataset("notes", TEXTS)
    assert (ds.num_slots, ds.num_units, ds.num_records, ds.privacy_unit) == (40, 40, 40, "datum")
    tc = run_on(service, ds)
    tc.forward_backward(dataset=ds)
    paid = tc.optim_step().result(30).dp_metrics
    (charge,) = charges(service, "notes")
    assert charge["event"] == {
        "kind": "sampled_gaussian",
        "noise_multiplier": "2.0",
        "sample_rate": "0.1",
        "vouched_by": "server",
    }
    assert service.get_dataset("notes").info.epsilon_spent == paid.total_epsilon
    assert tc.get_info().privacy.sample_rate == 0.1
    entries = service.get_privacy_ledger("notes").entries
    assert [e.kind for e in entries] == ["register", "open", "charge", "settle"]
    assert entries[0].body["slots"] == 40


def test_the_run_takes_the_size_of_its_dataset(service: ServiceClient) -> None:
    ds = service.create_dataset("notes", TEXTS)
    assert run_on(service, ds, dataset_size=None).config.dp_config.dataset_size == 40
    with pytest.raises(InvalidRequestError, match="registered with 40 privacy units, this run says 50"):
        run_on(service, ds, dataset_size=50)
    elsewhere = TrainingConfig(model_ref="bigram", dp_config=DPConfig(dataset_id="elsewhere", sampling="poisson"))
    with pytest.raises(InvalidRequestError, match="not registered, so sampling='poisson' needs dataset_size"):
        service.create_training_client(elsewhere)
    with pytest.raises(InvalidRequestError, match=r"target epsilon 8, delta 0\.01"):
        run_on(service, ds, target_epsilon=50.0)


def test_batches_of_the_client_are_refused_and_the_error_names_the_other_way(service: ServiceClient) -> None:
    ds = service.create_dataset("notes", TEXTS)
    tc = run_on(service, ds)
    with pytest.raises(InvalidRequestError, match=r"forward_backward\(dataset=...\).*sampling='none'"):
        tc.forward_backward(batch(1)).result(30)
    with pytest.raises(InvalidRequestError, match="incomplete"):
        tc.optim_step().result(30)  # the batch was dropped, as after every failed pass
    chosen = run_on(service, ds, sampling="none")
    chosen.forward_backward(batch(1))
    chosen.optim_step().result(30)
    assert charges(service, "notes")[0]["event"]["kind"] == "gaussian"
    with pytest.raises(InvalidRequestError, match="does not sample by Poisson"):
        chosen.forward_backward(dataset=ds).result(30)
    tc.eval()
    assert tc.forward_backward(batch(1)).result(30).loss > 0  # evaluation is the owner's
    with pytest.raises(InvalidRequestError, match="training only"):
        tc.forward_backward(dataset=ds)


def test_the_server_refuses_what_its_own_client_would_not_send(
    server: EmbeddedServer, service: ServiceClient
) -> None:
    ds = service.create_dataset("notes", TEXTS)
    service.create_dataset("other", TEXTS)
    raw = RawClient(server.address, server.mint_key("a"))
    run_id = run_on(service, ds).id
    evaluated = raw.call(run_id, 1, Pass.drawn_from("notes", train=False))
    assert "training only" in str(evaluated.error)
    assert "cannot be given another one" in str(raw.call(run_id, 2, Pass.drawn_from("other")).error)
    plain = service.create_training_client(TrainingConfig(model_ref="bigram")).id
    assert "no differential privacy" in str(raw.call(plain, 1, Pass.drawn_from("notes")).error)
    mixed = call_to_proto(Pass.drawn_from("notes"), Position(run_id=run_id, seq=3))
    mixed.MergeFrom(call_to_proto(Pass(batch=batch_data()), Position(run_id=run_id, seq=3)))
    raw.send(mixed)
    assert "not both" in str(raw.wait(run_id, 3).error)


def batch_data() -> Any:
    from tg_tinker import BatchData

    return BatchData(**batch(1))


def test_a_step_takes_one_draw_and_a_resent_call_is_the_same_draw(
    server: EmbeddedServer, service: ServiceClient, drawn: Draws
) -> None:
    ds = service.create_dataset("notes", TEXTS)
    raw = RawClient(server.address, server.mint_key("a"))
    run_id = run_on(service, ds).id
    first = raw.call(run_id, 1, Pass.drawn_from("notes")).result
    assert raw.call(run_id, 1, Pass.drawn_from("notes")).result == first
    assert len(drawn.made) == 1
    assert "one Poisson draw" in str(raw.call(run_id, 2, Pass.drawn_from("notes")).error)
    assert len(drawn.made) == 1
    assert raw.call(run_id, 3, Step()).status == "failed"  # by the rules of a failed pass
    assert charges(service, "notes") == []  # a draw that was not stepped costs nothing
    raw.call(run_id, 4, Pass.drawn_from("notes"))
    assert raw.call(run_id, 5, Step()).result.step == 1
    assert len(drawn.made) == 2
    assert len(charges(service, "notes")) == 1


def test_an_empty_draw_takes_a_noised_step_that_is_paid(service: ServiceClient, drawn: Draws) -> None:
    ds = service.create_dataset("notes", TEXTS)
    tc = run_on(service, ds)
    drawn.forced = []
    tc.forward_backward(dataset=ds)
    done = tc.optim_step().result(30)
    assert done.dp_metrics.noise_applied
    assert done.grad_norm > 0
    assert len(charges(service, "notes")) == 1


def test_a_draw_larger_than_one_pass_gives_the_figures_of_the_whole(service: ServiceClient, drawn: Draws) -> None:
    """40 records through passes of 16: loss and sum are those of the records one by one."""
    ds = service.create_dataset("notes", TEXTS, target_epsilon=1e4)
    tc = run_on(service, ds, max_grad_norm=0.1)
    drawn.forced = list(range(40))
    whole = tc.forward_backward(dataset=ds).result(30)
    norm = tc.optim_step().result(30).dp_metrics.grad_norm_after_clip
    alone = service.create_training_client(TrainingConfig(model_ref="bigram", seed=1))
    losses = [alone.forward_backward({"input_ids": [list(t.encode())]}).result(30).loss for t in TEXTS]
    assert whole.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert whole.metrics["records:sum"] == 40
    assert norm == pytest.approx(0.1, rel=1e-3)


class Sums:
    """Clipped sums as they stood before their noise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[np.ndarray] = []
        add = GaussianMechanism.add_noise_

        def record(mechanism: GaussianMechanism, arrays: Any) -> None:
            self.seen.append(arrays[0].copy())
            add(mechanism, arrays)

        monkeypatch.setattr(GaussianMechanism, "add_noise_", record)


@pytest.mark.parametrize("gone", range(4))
def test_erasing_one_unit_moves_the_clipped_sum_by_at_most_the_bound(
    service: ServiceClient, drawn: Draws, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    """Through the door: same draw, one unit less. Unit 3 has five records, which are clipped together."""
    sums, bound = Sums(monkeypatch), 0.05
    records = [*TEXTS[:3], *TEXTS[3:8]]
    units = ["a", "b", "c", *["d"] * 5]
    drawn.forced = [0, 1, 2, 3]
    for name in ("whole", "less"):
        ds = service.create_dataset(
            name, records, unit_ids=units, privacy_unit="user", target_epsilon=1e4, target_delta=1e-5
        )
        assert (ds.num_slots, ds.num_records) == (4, 8)
        if name == "less":
            unit = "abcd"[gone]
            assert ds.erase([i for i, u in zip(ds.record_ids, units, strict=True) if u == unit]) == units.count(unit)
            assert (ds.num_slots, ds.num_units) == (4, 3)
        tc = run_on(service, ds, batch_size=2, max_grad_norm=bound)
        tc.forward_backward(dataset=ds)
        tc.optim_step().result(30)
    assert charges(service, "whole")[0]["event"] == charges(service, "less")[0]["event"]  # the rate is a constant
    assert drawn.asked == [(4, 0.5), (4, 0.5)]
    moved = np.linalg.norm(sums.seen[0] - sums.seen[1])
    assert 0.9 * bound < moved <= bound


def test_every_unit_is_drawn_on_its_own_at_the_rate_and_with_all_its_records(
    service: ServiceClient, drawn: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    add = PendingBatch.add

    def watch(pending: PendingBatch, contribution: Any) -> None:
        seen[-1].update(contribution.units)
        add(pending, contribution)

    monkeypatch.setattr(PendingBatch, "add", watch)
    users = [f"u{i % 10}" for i in range(40)]
    ds = service.create_dataset("notes", TEXTS, unit_ids=users, privacy_unit="user", target_epsilon=1e4)
    tc = run_on(service, ds, batch_size=3)
    sizes = []
    for _ in range(30):
        seen.append(set())
        sizes.append(tc.forward_backward(dataset=ds).result(30).metrics["records:sum"])
        tc.optim_step().result(30)
    assert seen == [{f"slot-{s}" for s in made} for made in drawn.made]
    assert sizes == [4 * len(made) for made in drawn.made]
    total = sum(map(len, drawn.made))  # 300 independent chances of 0.3; 5 standard deviations
    assert abs(total - 90) < 5 * (300 * 0.3 * 0.7) ** 0.5
    assert len({tuple(m) for m in drawn.made}) > 10


def test_records_that_do_not_fit_are_refused_at_the_first_use_by_counts_alone(service: ServiceClient) -> None:
    secret = "a secret of forty letters and some more.."
    records = ["short", secret, "brief"]
    ds = service.create_dataset("long", records)
    config = {"model_ref": "bigram", "batch_size": 1, "max_sequence_length": 20}
    tc = service.create_training_client(TrainingConfig(**config, dp_config=ds.dp_config()))
    with pytest.raises(InvalidRequestError, match="1 of 3 records are longer than the 20 tokens") as e:
        tc.forward_backward(dataset=ds).result(30)
    assert "secret" not in str(e.value)
    quiet = service.create_training_client(TrainingConfig(**config, dp_config=ds.dp_config(diagnostics="off")))
    with pytest.raises(InvalidRequestError, match="some records are longer"):
        quiet.forward_backward(dataset=ds).result(30)
    cut = service.create_dataset("cut", records, truncate=True)
    fits = service.create_training_client(TrainingConfig(**config, dp_config=cut.dp_config(target_epsilon=8.0)))
    fits.forward_backward(dataset=cut).result(30)
    assert fits.optim_step().result(30).step == 1
    foreign = service.create_dataset("foreign", [{"input_ids": [1, 10**6]}, {"input_ids": [1]}])
    tc = service.create_training_client(TrainingConfig(**config, dp_config=foreign.dp_config()))
    with pytest.raises(InvalidRequestError, match="1 of 2 records hold ids outside"):
        tc.forward_backward(dataset=foreign).result(30)


@pytest.mark.parametrize("diagnostics", ["owner", "off"])
def test_without_diagnostics_nothing_in_a_reply_tells_one_draw_from_another(
    service: ServiceClient, drawn: Draws, diagnostics: str
) -> None:
    """Of a dataset with one unit left, two values of anything would say when it came."""
    ds = service.create_dataset("one", ["only me", "gone"], target_epsilon=1e4)
    ds.erase(ds.record_ids[1:])
    tc = run_on(service, ds, batch_size=1, diagnostics=diagnostics, noise_multiplier=50.0)
    said = []
    for drawn.forced in ([0], [], [1], [0, 1]):
        passed = tc.forward_backward(dataset=ds).result(30)
        stepped = tc.optim_step().result(30).dp_metrics
        said.append(
            f"{dataclasses.replace(passed, latency_ms=0)} {stepped.num_clipped} {stepped.grad_norm_before_clip}"
        )
    assert all(s == said[0] for s in said) == (diagnostics == "off")
    chosen = (
        run_on(service, ds, batch_size=1, diagnostics=diagnostics, sampling="none")
        .forward_backward(batch(1))
        .result(30)
    )
    assert chosen.batch_hash.startswith("hmac-sha256:")  # the caller's own batch is no secret from the caller


def test_masks_and_labels_of_token_records_count(service: ServiceClient, drawn: Draws) -> None:
    ids = [5, 6, 7, 8]
    record = {"input_ids": ids, "attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 9, -100]}
    ds = service.create_dataset("tokens", [record, {"input_ids": [1, 2]}], target_epsilon=1e4)
    tc = run_on(service, ds, batch_size=1)
    drawn.forced = [0]
    got = tc.forward_backward(dataset=ds).result(30)
    plain = service.create_training_client(TrainingConfig(model_ref="bigram", seed=1))
    expected = plain.forward_backward({name: [values] for name, values in record.items()}).result(30)
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert got.num_tokens == expected.num_tokens == 3
    assert got.metrics["tokens:sum"] == expected.metrics["tokens:sum"]


def test_what_is_erased_is_in_no_file_of_the_database(service: ServiceClient, tmp_path: Path) -> None:
    path = tmp_path / "data" / "tg-tinker.db"
    ds = service.create_dataset("notes", [f"{t} {'x' * 300}" for t in TEXTS])
    ids = ds.record_ids
    with sqlite3.connect(path) as db:
        rows = dict(db.execute("SELECT hex(record_id), sealed FROM dataset_records"))
        ((wrapped,),) = db.execute("SELECT wrapped_key FROM dataset_stores")
    sealed = {i: rows[i.removeprefix("rec_").upper()] for i in ids}

    def found(record_id: str) -> bool:
        return is_there(sealed[record_id])

    def is_there(secret: bytes) -> bool:
        bytes_there = b"".join(p.read_bytes() for p in path.parent.glob("tg-tinker.db*"))
        pieces = [secret[k : k + 16] for k in range(0, len(secret) - 15, 16)]
        return any(piece in bytes_there for piece in pieces)

    assert all(found(i) for i in ids)  # else the search proves nothing
    assert ds.erase([*ids[5:15], ids[5]]) == 10
    assert not any(found(i) for i in ids[5:15])
    assert all(found(i) for i in (*ids[:5], *ids[15:]))
    assert ds.record_ids == [*ids[:5], *ids[15:]]
    assert ds.erase(ids[5:15]) == 0
    assert is_there(wrapped)
    assert service.get_privacy_ledger("notes").entries[-1].body["records"] == 10
    service.delete_dataset("notes")
    assert not any(found(i) for i in ids)
    assert not is_there(wrapped)
    last = service.get_privacy_ledger("notes").entries[-1].body
    assert (last["kind"], last["records"], last["whole"]) == ("erase", 30, True)


def test_a_deleted_dataset_keeps_its_budget_and_its_name_for_ever(service: ServiceClient) -> None:
    ds = service.create_dataset("notes", TEXTS)
    tc = run_on(service, ds)
    tc.forward_backward(dataset=ds)
    spent = tc.optim_step().result(30).dp_metrics.total_epsilon
    service.delete_dataset("notes")
    assert service.get_privacy_ledger("notes").epsilon_spent == spent
    with pytest.raises(InvalidRequestError, match="were deleted"):
        tc.forward_backward(dataset=ds).result(30)
    with pytest.raises(InvalidRequestError, match="were deleted"):
        run_on(service, ds)
    with pytest.raises(InvalidRequestError, match="has a ledger already"):
        service.create_dataset("notes", TEXTS, target_epsilon=100.0)
    with pytest.raises(ResourceNotFoundError):
        service.get_dataset("notes")
    assert service.list_datasets() == []
    service.delete_dataset("notes")  # again changes nothing


def test_a_name_that_a_run_used_cannot_be_registered(service: ServiceClient) -> None:
    dp = DPConfig(dataset_id="used", sampling="poisson", dataset_size=1000)
    service.create_training_client(TrainingConfig(model_ref="bigram", dp_config=dp))
    with pytest.raises(InvalidRequestError, match="has a ledger already"):
        service.create_dataset("used", TEXTS)


def test_a_budget_officer_raises_the_target_and_it_is_logged_with_the_key(
    server: EmbeddedServer, service: ServiceClient
) -> None:
    ds = service.create_dataset("notes", TEXTS, target_epsilon=0.5)
    tc = run_on(service, ds)

    def train(steps: int) -> None:
        for _ in range(steps):
            tc.forward_backward(dataset=ds).result(30)
            tc.optim_step().result(30)

    with pytest.raises(DPBudgetExceededError):
        train(100)
    with (
        ServiceClient(api_key=server.mint_key("a"), base_url=server.address) as trainer,
        pytest.raises(AuthorizationError, match="budget_officer"),
    ):
        trainer.raise_budget("notes", 0.9, "no")
    before = service.get_dataset("notes").info.epsilon_spent
    for target, why in ((0.5, "raised"), (0.1, "raised"), (float("inf"), "finite"), (float("nan"), "finite")):
        with pytest.raises(InvalidRequestError, match=why):
            service.raise_budget("notes", target, "reason")
    with pytest.raises(InvalidRequestError, match="reason must be one line"):
        service.raise_budget("notes", 0.9, " ")
    raised = service.raise_budget("notes", 0.9, "board decision 7")
    assert (raised.target_epsilon, raised.epsilon_spent) == (0.9, before)
    entry = service.get_privacy_ledger("notes").entries[-1].body
    assert (entry["kind"], entry["from_epsilon"], entry["target_epsilon"]) == ("raise", "0.5", "0.9")
    assert entry["reason"] == "board decision 7"
    assert entry["actor"] == service.config.api_key.split("_")[1]
    tc.forward_backward(dataset=ds)
    assert before < tc.optim_step().result(30).dp_metrics.total_epsilon <= 0.9
    assert run_on(service, service.get_dataset("notes")).config.dp_config.target_epsilon == 0.9
    with pytest.raises(ResourceNotFoundError):
        service.raise_budget("nobody's", 9.0, "reason")


def test_records_and_settings_that_cannot_be_leave_no_dataset(service: ServiceClient) -> None:
    for records, more, match in (
        ([], {}, "no records"),
        ("text", {}, "a list of records"),
        (["a", ""], {}, "not empty"),
        (["a", 7], {}, "a record is a int"),
        ([{"input_ids": [[1]]}], {}, "list of integers"),
        ([{"ids": [1]}], {}, "unknown keys"),
        (["a", "b"], {"unit_ids": ["u", "u"]}, "privacy_unit='datum' protects single records"),
        (["a", "b"], {"privacy_unit": "user"}, "needs unit_ids"),
        (["a", "b"], {"privacy_unit": "user", "unit_ids": ["u"]}, "one for each of the 2 records"),
        (["a", "b"], {"privacy_unit": "person", "unit_ids": ["u", "v"]}, "privacy_unit"),
        (["a", "b"], {"target_delta": 0.5}, "below 1 / 2"),
        (["a", "b"], {"target_epsilon": -1.0}, "positive"),
    ):
        with pytest.raises(InvalidRequestError, match=match):
            service.create_dataset("d", records, **more)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="dataset_id"):
        service.create_dataset(" d", ["a"])
    assert service.list_datasets() == []
    assert service.create_dataset("d", ["a", "b"]).dp_config().target_delta == 0.2


def test_a_restarted_server_draws_anew_and_charges_the_step_once(tmp_path: Path, drawn: Draws) -> None:
    config = ServerConfig(port=free_port(), backend="bigram", data_dir=tmp_path / "data")
    server = EmbeddedServer(config).start()
    with ServiceClient(api_key=server.mint_key("a", ROLES), base_url=server.address) as service:
        ds = service.create_dataset("notes", TEXTS)
        tc = run_on(service, ds)
        first = tc.forward_backward(dataset=ds).result(30)
        server.stop()
        server = EmbeddedServer(config).start()
        assert tc.optim_step().result(60).step == 1
        assert len(drawn.made) == 2
        assert [c["event"]["vouched_by"] for c in charges(service, "notes")] == ["server"]
        assert first.loss > 0
        assert ds.refresh().num_records == 40
    server.stop()
