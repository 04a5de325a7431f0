"""What a site says with its signature when a job ends: the epsilon that it spent there, and where that is logged.

A document of format tg-tinker/site-statement/v1 in JCS (RFC 8785), in a DSSE envelope signed by the site's identity.
Probabilities and epsilons are decimal strings, rounded up. Sizes of data, losses and norms are not in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.federated.job import SiteName
from tg_tinker.federated.keys import public_key as key_from_text
from tg_tinker.ledger.releases import decimal_of
from tg_tinker.transparency._encoding import from_base64
from tg_tinker.transparency.dsse import open_envelope, sign_envelope
from tg_tinker.transparency.note import VerifierKey

PAYLOAD_TYPE = "application/vnd.tg-tinker.site-statement.v1+json"
KEY_PREFIX = "tg-tinker-site/"
_LARGEST = 4 * 2**20  # characters of a payload

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Accounting(_Part):
    """What epsilon was computed from, for whoever wants to compute it again.

    Attributes:
        noise_multiplier: of each step, over the clipping bound.
        sample_rate: Poisson inclusion probability that epsilon was computed with: the job's batch size over
            ``public_units``. The true one is not larger.
        steps: that were paid for by the job.
    """

    noise_multiplier: str
    sample_rate: str
    steps: int = Field(ge=0)

    @field_validator("noise_multiplier", "sample_rate")
    @classmethod
    def _decimal(cls, value: str) -> str:
        return _checked(value, infinite=False)


class SiteStatement(_Part):
    """A site's closing statement on a job.

    Attributes:
        job: digest of the job.
        time: when it was signed, ISO 8601 in UTC.
        rounds: in which the site trained, ascending. Whether its update was used is the coordinator's to say.
        unit: what epsilon protects; ``adjacency``: against adding or removing one of them.
        accountant: by which epsilon was computed: "rdp" is the gate of the site's ledger.
        epsilon: spent by this job at ``delta``, "inf" without privacy of records.
        target_epsilon: that the job had; "inf" if none.
        dataset_epsilon: of everything that was ever released from the site's data, at ``dataset_delta``.
        dataset_target_epsilon: the budget of that data; "inf" if none.
        public_units: that the site says it has at least; every epsilon is computed as if it had no more.
        log_origin: name of the transparency log of the site's own server.
        log_checkpoint: that log's signed note, right after the report.
        report_sha256: of the full signed privacy report, which the site keeps.
        accounting: only where the site's policy discloses it.
    """

    format: Literal["tg-tinker/site-statement/v1"] = "tg-tinker/site-statement/v1"
    job: Digest
    site: SiteName
    time: str = Field(max_length=64)
    rounds: tuple[int, ...]
    unit: str = Field(max_length=32)
    adjacency: Literal["add-or-remove-one"] = "add-or-remove-one"
    accountant: Literal["rdp"] = "rdp"
    epsilon: str
    delta: str
    target_epsilon: str
    dataset_epsilon: str
    dataset_delta: str
    dataset_target_epsilon: str
    public_units: int = Field(ge=1, lt=2**53)
    log_origin: str = Field(max_length=200)
    log_checkpoint: str = Field(max_length=100_000)
    report_sha256: Digest
    accounting: Accounting | None = None

    @field_validator("epsilon", "target_epsilon", "dataset_epsilon", "dataset_target_epsilon")
    @classmethod
    def _epsilon(cls, value: str) -> str:
        return _checked(value, infinite=True)

    @field_validator("delta", "dataset_delta")
    @classmethod
    def _delta(cls, value: str) -> str:
        if not 0 < float(_checked(value, infinite=False)) < 1:
            raise ValueError("a delta lies strictly between 0 and 1")
        return value

    @field_validator("rounds")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(r < 1 for r in value) or list(value) != sorted(set(value)):
            raise ValueError("rounds count from 1, ascending, each once")
        return value

    @property
    def epsilon_spent(self) -> float:
        """Epsilon of the job; inf without privacy of records."""
        return math.inf if self.epsilon == "inf" else float(self.epsilon)


def verifier_key(site: str, public_key: Ed25519PublicKey) -> VerifierKey:
    """A site's key under the name that its statements are signed with."""
    return VerifierKey(KEY_PREFIX + site, public_key.public_bytes_raw())


def sign_statement(statement: SiteStatement, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The statement in its DSSE envelope, a JSON object."""
    payload = rfc8785.dumps(statement.model_dump(mode="json"))
    return sign_envelope(PAYLOAD_TYPE, payload, verifier_key(statement.site, key.public_key()), key.sign)


def verify_statement(envelope: Mapping[str, Any], public_key: Ed25519PublicKey | str) -> SiteStatement:
    """The statement that a site signed.

    Args:
        public_key: of the site, as the job's roster has it. The caller compares ``job`` and ``site``.

    Raises:
        LogVerificationError: kind "bad_signature": no envelope, not signed by this key, or altered.
        InvalidRequestError: signed, and not a statement in its one spelling.
    """
    key = key_from_text(public_key) if isinstance(public_key, str) else public_key
    payload = open_envelope(envelope, verifier_key(_claimed_site(envelope), key), payload_type=PAYLOAD_TYPE)
    try:
        statement = SiteStatement.model_validate_json(payload)
    except ValidationError as e:
        fields = sorted({".".join(map(str, error["loc"])) or "the whole" for error in e.errors(include_input=False)})
        raise _refused(f"a field is missing, unknown or impossible: {', '.join(fields)[:200]}") from None
    if rfc8785.dumps(statement.model_dump(mode="json")) != payload:
        raise _refused("it is not in canonical form (RFC 8785)")
    return statement


def _claimed_site(envelope: Mapping[str, Any]) -> str:
    """Who a statement says it is from: a name for the key, checked with the signature."""
    try:
        text = envelope["payload"]
        site = json.loads(from_base64(text if len(text) <= _LARGEST else ""))["site"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise LogVerificationError("this is not a site's statement in a DSSE envelope", kind="bad_signature") from e
    return str(site)[:100]


def _checked(value: str, *, infinite: bool) -> str:
    decimal_of(value, "number", infinite=infinite)
    return value


def _refused(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the site's statement cannot be used: {why}", field="statement", constraint="tg-tinker/site-statement/v1"
    )
