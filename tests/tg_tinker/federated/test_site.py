"""A site's answers: what it takes, what it refuses and why, and that nothing else ever leaves."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import numpy as np
import pytest

from tests.tg_tinker.federated.jobs import key_of
from tests.tg_tinker.federated.site_lab import ADAPTER, COORDINATOR, TEXTS, Party, moved, site_job
from tg_tinker.errors import ServerError
from tg_tinker.federated import hello
from tg_tinker.federated.job import Strategy
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.messages import Envelope
from tg_tinker.federated.site import FAILED, SORRY, STRANGER, Site
from tg_tinker.federated.site_budget import Holding, solve_noise
from tg_tinker.federated.statement import verify_statement
from tg_tinker.ledger.history import Terms
from tg_tinker.types import TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path_factory.mktemp("server"))
    with EmbeddedServer(config) as server:
        yield server


@pytest.fixture
def party(server, tmp_path, request):
    party = Party(server, tmp_path, api_key=server.mint_key(f"tenant-of-{abs(hash(request.node.nodeid))}"))
    party.register(target_epsilon=8.0)
    return party


def refused(reply, reason):
    """A refusal holds a reason and a sentence, and nothing else."""
    assert set(reply.facts) == {"refused", "message"}, reply.facts
    assert reply.facts["refused"] == reason, reply.facts
    assert dict(reply.arrays) == {}
    assert reply.direction == "reply"
    return reply.facts["message"]


# A job from beginning to end.


def test_a_job_runs_to_its_statement(party):
    job = site_job()
    party.join(job)
    weights = ADAPTER
    for round_ in (1, 2):
        reply = party.ask(job, "train", round_, arrays=weights)
        assert reply.facts == {}
        assert (reply.kind, reply.job, reply.site, reply.round, reply.attempt) == (
            "train",
            job.digest(),
            "site-0",
            round_,
            1,
        )
        assert reply.arrays["table"].dtype == np.float32
        assert float(np.abs(reply.arrays["table"]).sum()) > 0
        weights = moved(weights, reply.arrays)
    statement = verify_statement(party.ask(job, "finish").facts["statement"], public_text(party.key))
    assert statement.job == job.digest()
    assert statement.rounds == (1, 2)
    assert party.charges() == 4
    assert [f["round"] for f in party.audit("federation.round_trained")] == ["1", "2"]
    assert len(party.audit("federation.join_accepted")) == 1
    assert len(party.audit("federation.statement_signed")) == 1
    with party.service() as service:
        assert service.list_training_clients(status="active") == []
        assert service.list_artifacts() == []


def test_joining_and_finishing_again_changes_nothing(party):
    job = site_job()
    party.join(job)
    party.join(job)
    party.ask(job, "train", 1, arrays=ADAPTER)
    first = party.ask(job, "finish")
    party.clock += timedelta(days=300)  # the job is long over
    assert party.ask(job, "finish").facts == first.facts
    refused(party.ask(job, "train", 2, arrays=ADAPTER), "expired")
    assert party.charges() == 2
    with party.service() as service:
        entries = service.get_privacy_ledger(party.dataset).entries
        assert sum(entry.kind == "report" for entry in entries) == 1
        assert service.list_training_clients(status="active") == []


def test_a_finished_job_is_trained_no_more(party):
    job = site_job()
    party.join(job)
    party.ask(job, "finish")
    refused(party.ask(job, "train", 1, arrays=ADAPTER), "wrong_round")
    assert party.charges() == 0


def test_the_same_request_gets_the_same_bytes_and_trains_once(party):
    job = site_job()
    party.join(job)
    request = party.request(job, "train", 1, arrays=ADAPTER)
    first, second = party.handle(request), party.handle(request)
    assert first.signature == second.signature
    assert first.signed_bytes() == second.signed_bytes()
    assert party.charges() == job.local_steps
    assert len(party.audit("federation.round_trained")) == 1


def test_duplicates_at_the_same_time_are_one_request(party):
    job = site_job()
    party.join(job)
    request = party.request(job, "train", 1, arrays=ADAPTER)
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(party.handle(request))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({reply.signature for reply in replies}) == 1
    assert replies[0].facts == {}
    assert party.charges() == job.local_steps


def test_a_site_that_missed_a_round_takes_the_next_one(party):
    job = site_job()
    party.join(job)
    assert party.ask(job, "train", 2, arrays=ADAPTER).facts == {}
    message = refused(party.ask(job, "train", 1, arrays=ADAPTER), "wrong_round")
    assert "was 2" in message
    assert party.charges() == 2


def test_the_update_is_a_step_from_the_weights_that_were_sent(party):
    """Without noise, momentum and sampling it is gradient descent; the gradient is computed here from its formula."""
    party.policy, party.dataset = {"require_record_privacy": False, "public_units": len(TEXTS)}, "open"
    party.register(target_epsilon=None)
    plain = {"name": "sgd", "learning_rate": 0.5, "momentum": 0.0, "nesterov": False}
    job = site_job(records=None, batch_size=len(TEXTS), local_steps=1, optimizer=plain)
    party.join(job)
    start = np.random.default_rng(3).normal(0, 0.1, (260, 260)).astype(np.float32)
    reply = party.ask(job, "train", 2, arrays={"table": start})
    expected = -0.5 * mean_gradient(start)
    np.testing.assert_allclose(reply.arrays["table"], expected, atol=1e-6)
    assert float(np.abs(expected).max()) > 0.01


def mean_gradient(table):
    """Of the bigram's loss over ``TEXTS``, each text's own mean per token, from its definition."""
    base = np.random.default_rng(20).normal(0.0, 0.5, (260, 260))
    total = np.zeros((260, 260))
    for text in TEXTS:
        ids = ByteTokenizer().encode(text)
        for here, following in pairwise(ids):
            logits = base[here] + table[here]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            p[following] -= 1
            total[here] += p / (len(ids) - 1)
    return total / len(TEXTS)


# Refusals.


def test_a_request_that_the_coordinator_did_not_sign_is_refused_and_noted(party):
    job = site_job()
    party.join(job)
    good = party.request(job, "train", 1, arrays=ADAPTER)
    other_arrays = {"table": ADAPTER["table"] + 1}
    service = party.service()
    site = Site(party.config(), service, party.key, now=lambda: party.clock)
    wrong = [
        replace(good, signature=b"", kind="finish"),
        replace(good, signature=b""),
        party.request(job, "train", 1, arrays=ADAPTER, key=key_of("mallory")),
        party.request(job, "train", 1, arrays=ADAPTER, key=party.key),
        replace(good, arrays=other_arrays),
        replace(good, round=2),
        replace(good, facts={"more": 1}),
        replace(good, facts={"odd": float("nan")}),
        replace(good, round=2**60),
        replace(good, job="x" * 5000),
        replace(good, kind="\ud800"),
    ]
    for minute in range(3):
        for request in wrong:
            reply = site.handle(request)
            assert refused(reply, "bad_signature") == STRANGER
            assert (reply.site, reply.signature) == ("", b"")  # a stranger learns nobody's name
        notes = party.audit("federation.round_refused")
        assert [(note["reason"], note["job"]) for note in notes] == [("bad_signature", "0" * 64)] * (minute + 1)
        party.clock += timedelta(seconds=61)
    service.close()
    assert party.charges() == 0


def test_a_request_to_another_site_or_of_the_wrong_direction_is_refused(party):
    job = site_job()
    refused(party.handle(replace(party.request(job, "join"), site="site-1").signed(COORDINATOR)), "unknown_site")
    echo = replace(party.request(job, "join"), direction="reply").signed(COORDINATOR)
    assert refused(party.handle(echo), "unknown_site")
    assert {note["reason"] for note in party.audit("federation.join_refused")} == {"unknown_site"}


@pytest.mark.parametrize(
    ("rules", "changes", "reason", "named"),
    [
        ({}, {"rounds": 1000}, "policy", "max_rounds 100"),
        ({"max_local_steps": 1}, {}, "policy", "local_steps 2"),
        ({"max_epsilon": 1.0}, {}, "policy", "target_epsilon 8"),
        ({"max_delta": 1e-9}, {}, "policy", "max_delta"),
        ({"base_models": ("other",)}, {}, "policy", "'bigram'"),
        ({"require_masking": True}, {}, "policy", "masking"),
        ({"min_sites": 2}, {}, "policy", "min_sites 1"),
        ({"federated_lora": ("freeze_a",)}, {}, "policy", "federated_lora"),
        ({"jobs": ("agreed",)}, {}, "policy", "job_id"),
        ({"privacy_unit": "user"}, {}, "policy", "'user'"),
        ({}, {"records": None}, "policy", "privacy of records"),
        ({"require_record_privacy": False}, {"records": None}, "policy", "registered with a budget"),
        ({}, {"coordinator": public_text(key_of("other"))}, "policy", "coordinator"),
        ({}, {"expires": "2026-06-01T00:00:00Z"}, "expired", "2026-06-01"),
        ({}, {"roster": {"site-1": public_text(key_of("site-0"))}}, "unknown_site", "site-0"),
        ({}, {"roster": {"site-0": public_text(key_of("site-1"))}}, "unknown_site", "site-0"),
        ({"base_models": ("large",)}, {"base_model": "large"}, "policy", "does not offer"),
        ({"privacy_unit": "user"}, {"records": {"unit": "user"}}, "policy", "'datum'"),
        ({}, {"batch_size": 1000}, "policy", "cannot carry"),
        ({}, {"masking": {}}, "too_few_sites", "3 sites"),
        ({"max_delta": 0.5}, {"records": {"target_delta": 0.2}}, "policy", "cannot carry"),
    ],
)
def test_a_job_that_breaks_a_rule_is_refused_before_data_is_touched(party, rules, changes, reason, named):
    party.policy = rules
    job = site_job(**changes)
    message = refused(party.ask(job, "join", facts={"job": job.model_dump(mode="json")}), reason)
    assert named in message
    assert [note["reason"] for note in party.audit("federation.join_refused")] == [reason]
    assert party.operations() == {"federation.join_refused"}  # nothing was opened, drawn or trained
    refused(party.ask(job, "train", 1, arrays=ADAPTER), "policy")


def test_a_job_must_be_the_one_that_the_message_names(party):
    job, other = site_job(), site_job(rounds=3)
    for facts in ({"job": other.model_dump(mode="json")}, {"job": {"rounds": -1}}, {}, {"job": "text"}):
        refused(party.ask(job, "join", facts=facts), "policy")
    refused(party.ask(job, "train", 1, arrays=ADAPTER), "policy")


def test_one_name_is_for_one_job(party):
    """Otherwise a job that the policy lists once would be taken, and paid for, under any number of seeds."""
    party.policy = {"jobs": ("icd", "icd-2")}
    first, second = site_job(), site_job(seed=1)
    party.join(first)
    message = refused(party.ask(second, "join", facts={"job": second.model_dump(mode="json")}), "policy")
    assert "job_id of its own" in message
    party.ask(first, "finish")  # which frees no name
    refused(party.ask(second, "join", facts={"job": second.model_dump(mode="json")}), "policy")
    party.join(site_job(seed=1, job_id="icd-2"))
    party.join(first)


def test_an_expired_job_is_finished_and_no_more(party):
    job = site_job()
    party.join(job)
    party.ask(job, "train", 1, arrays=ADAPTER)
    party.clock = job.expires
    refused(party.ask(job, "train", 2, arrays=ADAPTER), "expired")
    refused(party.ask(job, "join", facts={"job": job.model_dump(mode="json")}), "expired")
    assert set(party.ask(job, "finish").facts) == {"statement"}


def test_a_policy_that_was_tightened_holds_for_jobs_that_run(party):
    job = site_job()
    party.join(job)
    party.ask(job, "train", 1, arrays=ADAPTER)
    party.policy = {"max_rounds": 1}
    assert "max_rounds 1" in refused(party.ask(job, "train", 2, arrays=ADAPTER), "policy")
    assert party.charges() == 2


def test_a_round_is_trained_on_one_model_only(party):
    job = site_job()
    party.join(job)
    first = party.ask(job, "train", 1, arrays=ADAPTER)
    other = {"table": ADAPTER["table"] + 1}
    refused(party.ask(job, "train", 1, attempt=2, arrays=other), "wrong_round")
    again = party.ask(job, "train", 1, attempt=3, arrays=ADAPTER)
    np.testing.assert_array_equal(again.arrays["table"], first.arrays["table"])
    for round_ in (0, 3, -1):
        refused(party.ask(job, "train", round_, arrays=other), "wrong_round")
    assert party.charges() == job.local_steps


@pytest.mark.parametrize(
    ("round_", "arrays"),
    [
        (1, {"table": np.ones((260, 260), np.float32)}),  # not the adapter that the job names
        (2, {"table": np.zeros((260, 259), np.float32)}),
        (2, {"table": np.zeros((260, 260), np.float64)}),
        (2, {"other": np.zeros((260, 260), np.float32)}),
        (2, {"table": np.full((260, 260), np.nan, np.float32)}),
        (2, {}),
    ],
)
def test_a_global_model_that_does_not_fit_is_refused_and_the_round_stays_open(party, round_, arrays):
    job = site_job()
    party.join(job)
    refused(party.ask(job, "train", round_, arrays=arrays), "bad_update")
    assert party.ask(job, "train", round_, arrays=ADAPTER).facts == {}


def test_an_unknown_kind_is_refused(party):
    job = site_job()
    refused(party.ask(job, "train.more"), "policy")
    party.join(job)
    refused(party.ask(job, "weights"), "policy")
    refused(party.ask(job, "mask.keys", 1), "masking")


# Budgets.


def test_when_somebody_else_spent_the_budget_the_round_is_refused_and_says_so(party):
    job = site_job()
    party.join(job)
    party.ask(job, "train", 1, arrays=ADAPTER)
    with party.service() as service:
        dataset = service.get_dataset(party.dataset)
        dp = dataset.dp_config(noise_multiplier=1.0)
        with service.create_training_client(TrainingConfig(model_ref="bigram", dp_config=dp, batch_size=4)) as run:
            for _ in range(int(run.privacy.steps_remaining())):
                run.forward_backward(dataset=dataset).result()
                run.optim_step().result()
    before = party.charges()
    for attempt in (1, 2):
        message = refused(party.ask(job, "train", 2, attempt=attempt, arrays=ADAPTER), "policy")
        assert "budget" in message
        assert not any(character.isdigit() for character in message)
    assert party.charges() == before


def test_two_jobs_at_once_share_the_budget_and_both_come_to_their_end(party):
    party.policy = {"public_units": len(TEXTS)}
    jobs = [site_job(job_id=f"job-{e:.0f}", records={"target_epsilon": e}) for e in (7.0, 6.0)]
    for job in jobs:
        party.join(job)
    with party.state() as state:
        first, second = (state.job(job.digest()).noise_multiplier for job in jobs)
    other = Party(
        party.server, party.folder / "another", policy=party.policy, api_key=party.server.mint_key("with-one-job")
    )
    other.register(target_epsilon=8.0)
    other.join(jobs[1])
    with other.state() as state:
        alone = state.job(jobs[1].digest()).noise_multiplier
    assert second > alone  # the first one's steps are kept for it
    for round_ in (1, 2):
        for job in jobs:
            assert party.ask(job, "train", round_, arrays=ADAPTER).facts == {}
    with party.service() as service:
        assert 7.0 < service.get_dataset("data").info.epsilon_spent <= 8.0
    assert first < second


def test_steps_that_another_job_took_count_once(party):
    first, second = (site_job(job_id=f"job-{e}", records={"target_epsilon": e}) for e in (7, 6))
    party.join(first)
    party.ask(first, "train", 1, arrays=ADAPTER)
    party.join(second)
    with party.state() as state:
        sigma, found = (state.job(job.digest()).noise_multiplier for job in (first, second))
    terms = Terms(unit="datum", target_epsilon=8.0, target_delta=1e-5)
    spent = {(sigma, 4 / 16): 4}  # two steps taken, two to come; at least 16 texts, as anybody may know
    holding = Holding(public_units=16, terms=terms, spent=spent, promised={})
    assert found == solve_noise(second, holding, floor=0.3, max_epsilon=8.0)


# Sizes that could be found out by asking.


def accepts(party, job):
    return party.ask(job, "join", facts={"job": job.model_dump(mode="json")}).facts == {"accepted": True}


def test_sites_of_different_sizes_answer_alike(server, tmp_path):
    """Which batches fit, how much noise an update has and what is stated depend on the public size alone."""
    seen = []
    for units in (1024, 1100, 1999):
        party = Party(
            server,
            tmp_path / str(units),
            policy={"max_epsilon": 4.0, "disclose_accounting": True},
            api_key=server.mint_key(f"tenant-of-{units}"),
        )
        party.register([f"text {i}" for i in range(units)], target_epsilon=4.0)
        with party.service() as service:  # what was spent before, the site's size is in the ledger of
            dataset = service.get_dataset(party.dataset)
            config = TrainingConfig(
                model_ref="bigram", dp_config=dataset.dp_config(noise_multiplier=0.8), batch_size=64
            )
            with service.create_training_client(config) as run:
                run.forward_backward(dataset=dataset).result()
                run.optim_step().result()
        answers = [accepts(party, site_job(job_id=f"b{b}", batch_size=b)) for b in (1023, 1024, 1025, 1099, 1101)]
        job = site_job(job_id="one", batch_size=64, records={"target_epsilon": 3.5})
        for b in (1023, 1024):
            party.ask(site_job(job_id=f"b{b}", batch_size=b), "finish")
        party.join(job)
        assert party.ask(job, "train", 1, arrays=ADAPTER).facts == {}
        with party.state() as state:
            noise = state.job(job.digest()).noise_multiplier
        said = party.statement(job)
        assert float(said.dataset_epsilon) >= party.epsilon_of_all() - 1e-9
        assert said.public_units == 1024
        assert float(said.accounting.sample_rate) == 64 / 1024
        seen.append((answers, noise, said.epsilon, said.dataset_epsilon))
    assert seen[0] == seen[1] == seen[2]


def test_a_public_size_over_the_true_one_is_refused_and_told_to_the_operator_alone(party):
    party.policy = {"public_units": len(TEXTS) + 1}
    job = site_job()
    message = refused(party.ask(job, "join", facts={"job": job.model_dump(mode="json")}), "policy")
    assert not any(c.isdigit() for c in message)
    assert f"registered with {len(TEXTS)}" in (party.folder / "state" / "site.log").read_text()


def test_no_length_of_a_record_can_be_found_out_by_asking(party):
    """A job under the policy's length is refused for short records too; one at it trains on the longest."""
    party.dataset = "long"
    party.register([*TEXTS, "x" * 200], target_epsilon=8.0)
    longest = len(ByteTokenizer().encode("x" * 200))
    party.policy = {"max_record_tokens": 256}
    for dataset in ("data", "long"):
        party.dataset = dataset
        job = site_job(job_id=f"under-{dataset}", max_sequence_length=longest)
        message = refused(party.ask(job, "join", facts={"job": job.model_dump(mode="json")}), "policy")
        assert "max_record_tokens 256" in message
    job = site_job(max_sequence_length=256)
    party.join(job)
    assert party.ask(job, "train", 1, arrays=ADAPTER).facts == {}


# Nothing else leaves.


class Broken:
    """A server whose words must not travel."""

    def __init__(self, service, method):
        self._service, self._method = service, method

    def __getattr__(self, name):
        if name == self._method:
            raise ServerError("cannot read /secret/path of 4711 records: loss 2.718 at 10.0.0.7")
        return getattr(self._service, name)


@pytest.mark.parametrize(
    "method",
    ["get_server_capabilities", "get_dataset", "create_training_client", "import_weights", "get_signed_report"],
)
def test_what_breaks_at_a_site_is_told_as_one_sentence(party, method):
    job = site_job()
    kind = {"get_server_capabilities": "join", "get_dataset": "join", "get_signed_report": "finish"}.get(
        method, "train"
    )
    if kind != "join":
        party.join(job)
    facts = {"job": job.model_dump(mode="json")} if kind == "join" else {}
    arrays = ADAPTER if kind == "train" else {}
    service = party.service()
    site = Site(party.config(), Broken(service, method), party.key, now=lambda: party.clock)
    reply = site.handle(party.request(job, kind, 1 if kind == "train" else 0, facts=facts, arrays=arrays))
    service.close(wait_s=0)
    reply.verify(party.key.public_key())
    assert refused(reply, FAILED) == SORRY
    log = (party.folder / "state" / "site.log").read_text()
    assert "4711" in log  # the operator reads all of it
    assert "Traceback" in log
    assert len(party.audit("federation.round_failed")) == 1


def test_a_server_that_is_away_is_told_as_one_sentence_too(party):
    job = site_job()
    dead = Party(party.server, party.folder, api_key=party.api_key)

    class Away:
        def __getattr__(self, name):
            raise ConnectionError("10.0.0.7:50051 refused")

    site = Site(dead.config(), Away(), dead.key, now=lambda: dead.clock)
    reply = site.handle(dead.request(job, "join", facts={"job": job.model_dump(mode="json")}))
    assert refused(reply, FAILED) == SORRY


def test_no_reply_holds_a_loss_a_norm_a_size_a_path_or_a_name_of_the_server(party):
    """Everything that leaves in a job with refusals of every kind, searched for what must stay."""
    texts = [f"{text} canary-{i}" for i, text in enumerate(TEXTS * 37)]  # 851 records
    party.dataset = "wards"
    party.register(texts, target_epsilon=8.0)
    job = site_job()
    left: list[Envelope] = [party.join(job), party.ask(job, "train", 1, arrays=ADAPTER)]
    left.append(party.ask(job, "train", 1, arrays={"table": ADAPTER["table"] + 1}))
    left.append(party.ask(job, "train", 2, arrays={}))
    left.append(party.ask(job, "join", facts={"job": {}}))
    left.append(party.ask(job, "train", 2, arrays=ADAPTER))
    left.append(party.ask(job, "finish"))
    left.append(
        party.ask(site_job(batch_size=852), "join", facts={"job": site_job(batch_size=852).model_dump(mode="json")})
    )
    with party.state() as state:
        sigma = state.job(job.digest()).noise_multiplier
        (run_id,) = state.run_ids(job.digest())
    statement = json.dumps(json.loads(decoded(left[-2].facts["statement"])))
    for text in [*(json.dumps(dict(reply.facts)) for reply in left), statement]:
        for kept in ("851", str(party.folder), party.server.address, "wards", "canary", "loss", "norm", str(sigma)):
            assert kept not in text, kept
        assert run_id not in text
    assert {name for reply in left for name in reply.arrays} == {"table"}
    for reply in (left[1], left[5]):
        assert reply.facts == {}


def decoded(envelope):
    return base64.b64decode(envelope["payload"])


# Who is there.


def test_a_site_tells_the_coordinator_its_name_and_nobody_else(party):
    question = hello.ask(COORDINATOR)
    roster = {"site-0": public_text(party.key)}
    assert hello.recognise(party.handle(question), question, roster=roster) == "site-0"
    service = party.service()
    site = Site(party.config(), service, party.key)
    answer = site.handle(hello.ask(key_of("mallory")))
    assert answer.signature == b""
    assert "site-0" not in json.dumps([answer.site, dict(answer.facts)])
    assert answer.facts["refused"] == "bad_signature"
    service.close()


# What the run is made of.


def test_the_run_has_the_settings_of_the_job_and_noise_that_keeps_every_limit(party):
    job = site_job(
        strategy=Strategy(name="fedprox", proximal_mu=0.25),
        optimizer={"name": "sgd", "learning_rate": 0.5, "lr_scheduler": "cosine"},
        seed=11,
        records={"target_epsilon": 3.0, "max_grad_norm": 0.7},
    )
    party.join(job)
    party.ask(job, "train", 1, arrays=ADAPTER)
    with party.state() as state:
        record = state.job(job.digest())
        (run_id,) = state.run_ids(job.digest())
    with party.service() as service:
        config = service.get_training_client(run_id).config
    assert (config.model_ref, config.batch_size, config.max_steps, config.seed) == ("bigram", 4, 4, 11)
    assert config.optimizer.proximal_mu == 0.25
    assert config.optimizer.lr_scheduler == "cosine"
    dp = config.dp_config
    assert (dp.noise_multiplier, dp.max_grad_norm, dp.diagnostics, dp.sampling) == (
        record.noise_multiplier,
        0.7,
        "off",
        "poisson",
    )
    assert dp.dataset_id == party.dataset
