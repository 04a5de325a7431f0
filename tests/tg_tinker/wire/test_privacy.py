import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger import LEDGER_DOMAIN, START, ChainEntry, PrivacyLedger
from tg_tinker.proto.v1 import privacy_pb2
from tg_tinker.wire.privacy import (
    Forecast,
    audit_from_lines,
    forecast_from_proto,
    forecast_to_proto,
    ledger_from_proto,
    ledger_to_proto,
)

NUMBER = st.floats(allow_nan=False)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    st.builds(
        Forecast,
        epsilon_now=NUMBER,
        epsilon_after=NUMBER,
        steps_remaining=st.integers(-1, 2**62),
        delta=NUMBER,
        ledger_head=st.binary(max_size=32),
    )
)
def test_a_forecast_survives_the_wire(forecast):
    message = privacy_pb2.ForecastPrivacyReply.FromString(forecast_to_proto(forecast).SerializeToString())
    assert forecast_from_proto(message) == forecast


@given(st.lists(st.dictionaries(TEXT, TEXT, max_size=3), max_size=4), NUMBER)
def test_a_ledger_survives_the_wire_entry_by_entry(bodies, epsilon):
    entries, before = [], START
    for position, body in enumerate(bodies):
        entries.append(ChainEntry.make(LEDGER_DOMAIN, body, position=position, prev_hash=before))
        before = entries[-1].entry_hash
    ledger = PrivacyLedger(
        dataset_id="d", entries=tuple(entries), epsilon_spent=epsilon, target_epsilon=8.0, delta=1e-5
    )
    message = privacy_pb2.GetLedgerReply.FromString(ledger_to_proto(ledger).SerializeToString())
    assert ledger_from_proto(message) == ledger


@pytest.mark.parametrize("line", ["{", "[]", '{"body": {}, "entry_hash": ""}', json.dumps({"body": 1})])
def test_a_line_that_is_no_audit_record_is_refused(line):
    with pytest.raises(InvalidRequestError):
        audit_from_lines([line])
