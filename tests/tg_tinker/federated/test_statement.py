"""The closing statement: what the ledger says, signed, and nothing that tells how much data there is."""

from __future__ import annotations

import base64
import hashlib
import json
import math

import pytest
import rfc8785

from tests.tg_tinker.federated.jobs import key_of
from tests.tg_tinker.federated.site_lab import ADAPTER, Party, site_job
from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.statement import (
    PAYLOAD_TYPE,
    Accounting,
    SiteStatement,
    sign_statement,
    verifier_key,
    verify_statement,
)
from tg_tinker.privacy.accounting import gate_epsilon
from tg_tinker.reports.documents import verify_document
from tg_tinker.reports.verdicts import Trust
from tg_tinker.transparency.dsse import pae, sign_envelope
from tg_tinker.transparency.note import Checkpoint, VerifierKey
from tg_tinker.wire.privacy import report_of
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

KEY = key_of("site-0")
STATEMENT = SiteStatement(
    job="a" * 64,
    site="site-0",
    time="2026-06-01T00:00:00+00:00",
    rounds=(1, 3),
    unit="datum",
    epsilon="2.34",
    delta="1e-06",
    target_epsilon="3.0",
    dataset_epsilon="2.50",
    dataset_delta="1e-05",
    dataset_target_epsilon="inf",
    public_units=1024,
    log_origin="tg-tinker/x",
    log_checkpoint="note",
    report_sha256="b" * 64,
)


def test_a_statement_is_what_was_signed():
    envelope = json.loads(json.dumps(sign_statement(STATEMENT, KEY)))
    assert verify_statement(envelope, KEY.public_key()) == STATEMENT
    assert verify_statement(envelope, public_text(KEY)).epsilon_spent == 2.34


def test_the_signature_is_dsse_over_jcs_as_anybody_can_check():
    envelope = sign_statement(STATEMENT, KEY)
    payload = base64.b64decode(envelope["payload"])
    assert json.loads(payload)["rounds"] == [1, 3]
    assert payload == rfc8785.dumps(json.loads(payload))
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    KEY.public_key().verify(signature, pae(PAYLOAD_TYPE, payload))  # raises if it is not


def altered(**fields):
    envelope = sign_statement(STATEMENT, KEY)
    document = {**json.loads(base64.b64decode(envelope["payload"])), **fields}
    return {**envelope, "payload": base64.b64encode(rfc8785.dumps(document)).decode()}


@pytest.mark.parametrize(
    "envelope",
    [
        altered(epsilon="1.00"),
        altered(site="site-1"),
        altered(rounds=[1]),
        {**sign_statement(STATEMENT, KEY), "payloadType": "application/json"},
        sign_statement(STATEMENT, key_of("site-1")),
        {},
        {"payload": 3, "payloadType": PAYLOAD_TYPE, "signatures": []},
        {**sign_statement(STATEMENT, KEY), "signatures": []},
    ],
)
def test_what_this_key_did_not_sign_is_refused(envelope):
    with pytest.raises(LogVerificationError) as caught:
        verify_statement(envelope, KEY.public_key())
    assert caught.value.kind == "bad_signature"


def signed(payload: bytes, site="site-0"):
    return sign_envelope(PAYLOAD_TYPE, payload, verifier_key(site, KEY.public_key()), KEY.sign)


def document(**fields):
    return {**STATEMENT.model_dump(mode="json"), **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"epsilon": "-1"},
        {"epsilon": "nan"},
        {"epsilon": 2.0},
        {"delta": "inf"},
        {"delta": "1"},
        {"delta": "0"},
        {"rounds": [3, 1]},
        {"rounds": [0]},
        {"surprise": 1},
        {"format": "tg-tinker/site-statement/v2"},
        {"adjacency": "replace-one"},
        {"report_sha256": "zz"},
        {"accounting": {"noise_multiplier": "1.0", "sample_rate": "x", "steps": 1}},
    ],
)
def test_what_is_signed_and_makes_no_sense_is_refused(fields):
    with pytest.raises(InvalidRequestError):
        verify_statement(signed(rfc8785.dumps(document(**fields))), KEY.public_key())


def test_only_one_spelling_of_a_statement_counts():
    loose = json.dumps(document()).encode()
    with pytest.raises(InvalidRequestError, match="canonical"):
        verify_statement(signed(loose), KEY.public_key())


# Against a real site.


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path_factory.mktemp("server"))
    with EmbeddedServer(config) as server:
        yield server


def finished(server, folder, *, dataset, target=8.0, rules=None, **changes):
    api_key = server.mint_key(f"tenant-{dataset}")
    party = Party(server, folder, dataset=dataset, policy=rules or {}, api_key=api_key)
    party.register(target_epsilon=target)
    job = site_job(**changes)
    party.join(job)
    party.ask(job, "train", 1, arrays=ADAPTER)
    envelope = party.ask(job, "finish").facts["statement"]
    return party, job, verify_statement(envelope, public_text(party.key))


def test_the_statement_says_what_the_ledger_says(server, tmp_path):
    rules = {"disclose_accounting": True}
    records = {"target_epsilon": 3.0, "target_delta": 1e-6}
    party, job, statement = finished(server, tmp_path, dataset="one", rules=rules, records=records)
    accounting = statement.accounting
    assert accounting is not None
    assert accounting.steps == party.charges() == 2
    assert float(accounting.sample_rate) == job.batch_size / 16
    assert statement.public_units == 16  # of 23
    with party.service() as service:
        events = [c.body["event"] for c in service.get_privacy_ledger("one").charges]
        spent = service.get_dataset("one").info.epsilon_spent
    assert {float(event["noise_multiplier"]) for event in events} == {float(accounting.noise_multiplier)}
    sigma, rate = float(accounting.noise_multiplier), float(accounting.sample_rate)
    exact = gate_epsilon({(sigma, rate): 2}, 1e-6)
    assert exact <= statement.epsilon_spent < exact + 0.01
    assert exact < 3.0 < gate_epsilon({(sigma - 1e-3, rate): 4}, 1e-6)  # half of what was planned
    in_all = gate_epsilon({(sigma, rate): 2}, 1e-5)
    assert spent < in_all <= float(statement.dataset_epsilon) < in_all + 0.01  # spent is at the true rate
    assert (statement.delta, statement.target_epsilon) == ("1e-06", "3.0")
    assert (statement.dataset_delta, statement.dataset_target_epsilon) == ("1e-05", "8.0")
    assert statement.rounds == (1,)


def test_the_statement_names_the_report_that_the_site_keeps_and_the_log_that_it_is_in(server, tmp_path):
    party, job, statement = finished(server, tmp_path, dataset="two")
    with party.state() as state:
        report = state.report(job.digest())
    assert hashlib.sha256(report).hexdigest() == statement.report_sha256
    integrity = report_of(report)["integrity"]
    key = VerifierKey.parse(integrity["verifier_key"])
    assert list(verify_document(report, Trust(keys=[key])))  # it is a report, to its end
    assert key.name == statement.log_origin
    assert Checkpoint.open(statement.log_checkpoint, key).size == integrity["entries"][-1]["leaf_index"] + 1


def test_without_the_policys_leave_the_statement_tells_no_noise_and_no_rate(server, tmp_path):
    _, _, statement = finished(server, tmp_path, dataset="three")
    assert statement.accounting is None


def test_without_privacy_of_records_epsilon_is_infinite_and_the_statement_says_so(server, tmp_path):
    rules = {"require_record_privacy": False, "disclose_accounting": True}
    _, _, statement = finished(server, tmp_path, dataset="four", rules=rules, records=None, target=None)
    assert (statement.epsilon, statement.dataset_epsilon, statement.target_epsilon) == ("inf", "inf", "inf")
    assert statement.epsilon_spent == math.inf
    assert statement.accounting is None


def test_accounting_is_numbers():
    with pytest.raises(ValueError):
        Accounting(noise_multiplier="inf", sample_rate="0.1", steps=1)
