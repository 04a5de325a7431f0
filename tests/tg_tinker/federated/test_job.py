"""What no job can be: parties that share a key, numbers that its digest cannot hold."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from pydantic import ValidationError

from tests.tg_tinker.federated.jobs import key_of, make_job
from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import public_text

ONE, OTHER = public_text(key_of("site-0")), public_text(key_of("site-1"))


@pytest.mark.parametrize(
    ("roster", "said"),
    [
        ({"site-0": ONE, "site-1": ONE}, "site site-0 and site site-1 have the same"),
        (
            {"site-0": ONE, "site-1": public_text(key_of("coordinator"))},
            "the coordinator and site site-1 have the same",
        ),
    ],
)
def test_no_two_parties_have_one_key(roster: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        make_job(roster=roster)
    assert len(make_job(roster={"site-0": ONE, "site-1": OTHER}).roster) == 2


def test_one_key_cannot_be_written_in_two_ways() -> None:
    """The last character of 32 bytes in base64 has two bits that a lax reader ignores."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    twin = ONE[:42] + alphabet[alphabet.index(ONE[42]) + 1] + "="
    assert base64.b64decode(twin) == base64.b64decode(ONE)
    with pytest.raises(ValidationError, match="roster"):
        make_job(roster={"site-0": ONE, "site-1": twin})


SITES = {"population": 5, "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 2**53},
        {"max_sequence_length": 2**53},
        {"strategy": {"num_malicious": 2**53}},
        {"sites_privacy": {**SITES, "population": 2**53}},
    ],
)
def test_integers_that_doubles_cannot_hold_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_job(**settings)


def test_the_largest_integers_have_a_digest_and_survive_json() -> None:
    most = 2**53 - 1
    job = make_job(
        seed=most,
        max_sequence_length=most,
        strategy={"num_malicious": most},
        sites_privacy={**SITES, "population": most},
    )
    assert len(job.digest()) == 64
    assert Job.model_validate_json(job.model_dump_json()).digest() == job.digest()
