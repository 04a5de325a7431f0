"""coordinator.toml: one job, the coordinator's server, its key and its folder.

    server = "127.0.0.1:50051"          # its own tg-tinker server
    api_key_file = "coordinator.api-key"  # or api_key_env; roles trainer, exporter, auditor
    identity = "coordinator.key"        # made by `tg-tinker federated keygen`
    state_dir = "coordinator-state"     # of this job alone

    [job]
    job_id = "icd10"
    base_model = "..."
    rounds = 10
    batch_size = 32
    expires = 2027-01-31T00:00:00Z
    roster = { north = "keys/north.pub", south = "MCow...=" }   # files or the keys themselves

Paths are relative to the file. Unknown names are refused. The job is the one of ``job.py`` without what the
coordinator adds itself: its own public key and the digest of the first adapter, which its server draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError, model_validator

from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.flower_settings import FlowerCoordinator
from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import public_key, public_text
from tg_tinker.federated.party_config import PartyConfig, what_is_wrong

ADDED = ("adapter_digest", "coordinator")
"""Fields of a job that the coordinator fills in."""
MAX_UPDATE_NORM = 1e4
"""Default ceiling of an update's L2 norm. An adapter of a hundred million parameters has that norm if every one moved
by 1, its own scale, which no round of training does; and a mean of such updates added in each of the 100,000 rounds
that a job may have stays below 1e9, far from float32's 3e38."""
_NO_DIGEST = "0" * 64


class CoordinatorConfig(PartyConfig):
    """All that a coordinator is told, besides what every party is.

    Attributes:
        job: the job's fields without ``ADDED``; checked as a job when this is made. ``state_dir`` is of it alone.
        max_attempts: how often a round is tried.
        max_update_norm: longest update that is taken, L2 norm over all arrays; a longer one is refused, its site
            named, and the round goes on without it. Our own rule, sites do not learn it. ``None``: any that leaves
            the model finite.
        join_timeout_s: how long to wait for sites to appear before the first round.
        pause_s: between two looks for sites, and before a round is tried again.
        flower: for the app that carries the messages.
    """

    FILE: ClassVar[str] = "coordinator.toml"

    job: dict[str, Any]
    max_attempts: int = Field(3, ge=1, le=1000)
    max_update_norm: float | None = Field(MAX_UPDATE_NORM, gt=0, allow_inf_nan=False)
    join_timeout_s: float = Field(60.0, ge=0, allow_inf_nan=False)
    pause_s: float = Field(1.0, gt=0, allow_inf_nan=False)
    flower: FlowerCoordinator | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        try:
            self.job_with(coordinator=_any_key(), adapter_digest=_NO_DIGEST)
        except InvalidRequestError as e:
            raise ValueError(e.message) from e
        return self

    @classmethod
    def _prepare(cls, given: dict[str, Any], folder: Path) -> None:
        """Take the roster's keys from their files."""
        roster = given["job"].get("roster") if isinstance(given.get("job"), dict) else None
        if isinstance(roster, dict):
            given["job"]["roster"] = {site: _key_text(folder, site, text) for site, text in roster.items()}

    def job_with(self, *, coordinator: Ed25519PrivateKey, adapter_digest: str) -> Job:
        """The whole job.

        Raises:
            InvalidRequestError: naming the field that is wrong.
        """
        if given := [name for name in ADDED if name in self.job]:
            raise CoordinatorConfig.wrong(f"job.{given[0]} is filled in by the coordinator; leave it out", "left out")
        added = {"coordinator": public_text(coordinator), "adapter_digest": adapter_digest}
        try:
            return Job.model_validate({**self.job, **added})
        except ValidationError as e:
            raise CoordinatorConfig.wrong(what_is_wrong(e, within="job"), "the fields of a job") from None

    def is_of(self, job: Job, key: Ed25519PrivateKey) -> bool:
        """Whether a job is the one that this configuration and key ask for."""
        return self.job_with(coordinator=key, adapter_digest=job.adapter_digest) == job


def _any_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(32))


def _key_text(folder: Path, site: object, given: object) -> str:
    """A public key: itself, or the content of the file of that name."""
    if not isinstance(given, str):
        raise CoordinatorConfig.wrong(
            f"job.roster.{site} is neither a public key nor the name of a file with one", "text"
        )
    try:
        public_key(given)
        return given
    except InvalidRequestError:
        pass
    try:
        found = (folder / given).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise CoordinatorConfig.wrong(
            f"job.roster.{site}: {given[:80]!r} is neither a public key (44 characters of base64) nor a "
            "readable file",
            "a public key",
        ) from e
    public_key(found)
    return found
