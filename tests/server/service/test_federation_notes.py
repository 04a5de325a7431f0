"""Notes on a federation in the audit log: of listed values, by who may train, and durable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tg_tinker import ServiceClient
from tg_tinker.errors import AuthorizationError, InvalidRequestError
from tg_tinker.types.federation import EVENTS, REFUSALS
from tg_tinker.wire import federation
from tg_tinker_server.app import EmbeddedServer

JOB = "cd" * 32


@pytest.fixture
def service(bigram_server: EmbeddedServer) -> Iterator[ServiceClient]:
    with ServiceClient(bigram_server.mint_key("clinic", ("trainer", "auditor")), bigram_server.address) as client:
        yield client


def test_each_event_is_a_record_with_its_actor(service: ServiceClient) -> None:
    for round_, event in enumerate(sorted(EVENTS)):
        service.note_federation(event, job=JOB, round=round_, reason="policy" if event in REFUSALS else "")
    records = service.get_audit_logs()
    assert [r.operation for r in records] == [f"federation.{e}" for e in sorted(EVENTS)]
    for round_, (event, record) in enumerate(zip(sorted(EVENTS), records, strict=True)):
        refused = event in REFUSALS
        reason = {"reason": "policy"} if refused else {}
        assert record.facts == {"job": JOB, "round": str(round_), **reason}
        assert (record.success, record.error_code) == (not refused, "FEDERATION_REFUSED" if refused else "")
        assert record.actor
        assert (record.training_client_id, record.artifact_ids) == ("", [])


@pytest.mark.parametrize(
    "bad",
    [
        ("joined", JOB, 0, ""),
        ("join_refused", "Mrs Example", 0, ""),
        ("join_refused", JOB, 0, "Mrs Example"),
        ("round_trained", JOB, 0, "policy"),
        ("round_trained", JOB, -1, ""),
    ],
)
def test_free_text_reaches_no_record_whatever_the_client(service: ServiceClient, bad: Any) -> None:
    with pytest.raises(InvalidRequestError):
        service._transport.call(federation.note(*bad))  # past the client's own check
    event, job, round_, reason = bad
    with pytest.raises(InvalidRequestError):
        service.note_federation(event, job=job, round=round_, reason=reason)
    assert service.get_audit_logs() == []


def test_who_may_not_train_may_not_note(bigram_server: EmbeddedServer) -> None:
    key = bigram_server.mint_key("clinic", ("auditor", "exporter", "sampler"))
    with ServiceClient(key, bigram_server.address) as service, pytest.raises(AuthorizationError):
        service.note_federation("job_finished", job=JOB)
