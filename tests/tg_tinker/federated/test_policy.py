"""A site's policy: each rule refuses by itself, with the job's value and the limit; a fitting job passes."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.job import Job, Masking
from tg_tinker.federated.policy import SitePolicy

NOW = datetime(2026, 6, 1, tzinfo=UTC)
KEY, OTHER, *SITES = (base64.b64encode(bytes([b]) * 32).decode() for b in range(1, 6))


def job(**changes):
    fields = {
        "job_id": "icd",
        "base_model": "bigram",
        "rounds": 10,
        "local_steps": 4,
        "batch_size": 8,
        "roster": dict(zip(("north", "south", "west"), SITES, strict=True)),
        "coordinator": KEY,
        "min_sites": 2,
        "expires": NOW + timedelta(days=1),
        "adapter_digest": "0" * 64,
        "records": {"target_epsilon": 3.0, "target_delta": 1e-6, "unit": "user"},
        **changes,
    }
    return Job.model_validate(fields)


def policy(**changes):
    fields = {
        "coordinator": KEY,
        "base_models": ["bigram", "tiny"],
        "max_record_tokens": 64,
        "max_rounds": 10,
        "max_local_steps": 4,
        "max_epsilon": 3.0,
        "max_delta": 1e-6,
        "privacy_unit": "user",
        "min_sites": 2,
        **changes,
    }
    return SitePolicy.model_validate(fields)


def test_a_job_at_every_limit_is_taken():
    policy(jobs=["icd"], federated_lora=["both"]).check(job(), NOW)
    policy(require_masking=True).check(job(masking=Masking()), NOW)
    policy().check(job(max_sequence_length=64), NOW)
    policy(require_record_privacy=False).check(job(records=None), NOW)


RECORDS = {"target_epsilon": 3.0, "target_delta": 1e-6, "unit": "user"}


@pytest.mark.parametrize(
    ("rules", "changes", "named"),
    [
        ({"coordinator": OTHER}, {}, ["coordinator"]),
        ({"jobs": ["other"]}, {}, ["job_id 'icd'"]),
        ({}, {"base_model": "large"}, ["'large'", "'bigram', 'tiny'"]),
        ({"federated_lora": ["freeze_a"]}, {}, ["'both'", "'freeze_a'"]),
        ({}, {"max_sequence_length": 63}, ["max_sequence_length 63", "max_record_tokens 64"]),
        ({}, {"rounds": 11}, ["rounds 11", "max_rounds 10"]),
        ({}, {"local_steps": 5}, ["local_steps 5", "max_local_steps 4"]),
        ({}, {"min_sites": 1}, ["min_sites 1", "2"]),
        ({"require_masking": True}, {}, ["masking"]),
        ({}, {"records": None}, ["privacy of records"]),
        ({}, {"records": {**RECORDS, "target_epsilon": 3.01}}, ["target_epsilon 3.01", "max_epsilon 3"]),
        ({}, {"records": {**RECORDS, "target_delta": 2e-6}}, ["target_delta 2e-06", "max_delta 1e-06"]),
        ({}, {"records": {**RECORDS, "unit": "datum"}}, ["'datum'", "'user'"]),
    ],
)
def test_each_rule_refuses_and_names_the_value_and_the_limit(rules, changes, named):
    with pytest.raises(FederationRefusedError) as caught:
        policy(**rules).check(job(**changes), NOW)
    assert caught.value.reason == "policy"
    assert all(text in caught.value.message for text in named)
    assert ";" not in caught.value.message  # this rule and no other


def test_one_message_holds_every_breach():
    with pytest.raises(FederationRefusedError) as caught:
        policy(jobs=["other"]).check(job(rounds=99, min_sites=1, base_model="large"), NOW + timedelta(days=2))
    assert caught.value.reason == "policy"
    for text in ("job_id", "max_rounds", "min_sites", "'large'", "expired"):
        assert text in caught.value.message


def test_a_job_expires_at_its_moment():
    policy().check(job(), NOW + timedelta(days=1) - timedelta(microseconds=1))
    with pytest.raises(FederationRefusedError, match="expired at 2026-06-02") as caught:
        policy().check(job(), NOW + timedelta(days=1))
    assert caught.value.reason == "expired"


@pytest.mark.parametrize(
    "wrong",
    [
        {"surprise": 1},
        {"base_models": []},
        {"federated_lora": ["all"]},
        {"max_epsilon": float("nan")},
        {"coordinator": "short"},
        {"jobs": ["Not A Name"]},
    ],
)
def test_a_policy_that_cannot_be_is_not_made(wrong):
    with pytest.raises(ValidationError):
        policy(**wrong)


@pytest.mark.parametrize(("units", "told"), [(1, 1), (2, 2), (3, 2), (1023, 512), (1024, 1024), (50_000, 32768)])
def test_the_public_size_is_a_power_of_two_unless_somebody_says_otherwise(units, told):
    assert policy().units_told(units) == told
    assert policy(public_units=units).units_told(units) == units
    with pytest.raises(InvalidRequestError, match=f"registered with {units}"):
        policy(public_units=units + 1).units_told(units)


def test_record_privacy_is_required_unless_somebody_says_otherwise():
    assert SitePolicy(coordinator=KEY, base_models=("m",), max_record_tokens=64).require_record_privacy
