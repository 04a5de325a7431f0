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

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tg_tinker._endpoint import parse_base_url
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.flower_settings import FlowerCoordinator
from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import load_identity, public_key, public_text, read_secret
from tg_tinker.service_client import ServiceClient

ADDED = ("adapter_digest", "coordinator")
"""Fields of a job that the coordinator fills in."""
MAX_UPDATE_NORM = 1e4
"""Default ceiling of an update's L2 norm. An adapter of a hundred million parameters has that norm if every one moved
by 1, its own scale, which no round of training does; and a mean of such updates added in each of the 100,000 rounds
that a job may have stays below 1e9, far from float32's 3e38."""
_NO_DIGEST = "0" * 64


class CoordinatorConfig(BaseModel):
    """All that a coordinator is told.

    Attributes:
        server: as ``ServiceClient(base_url=...)``; certificates for TLS come from ``TG_TINKER_TLS_*``.
        api_key_file: a file of mode 0600 with the key, or
        api_key_env: the name of the environment variable that holds it.
        job: the job's fields without ``ADDED``; checked as a job when this is made.
        identity: file of the coordinator's private key.
        state_dir: of this job alone.
        max_attempts: how often a round is tried.
        max_update_norm: longest update that is taken, L2 norm over all arrays; a longer one is refused, its site
            named, and the round goes on without it. Our own rule, sites do not learn it. ``None``: any that leaves
            the model finite.
        join_timeout_s: how long to wait for sites to appear before the first round.
        pause_s: between two looks for sites, and before a round is tried again.
        flower: for the app that carries the messages.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: dict[str, Any]
    server: str
    identity: Path
    state_dir: Path
    api_key_file: Path | None = None
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    max_attempts: int = Field(3, ge=1, le=1000)
    max_update_norm: float | None = Field(MAX_UPDATE_NORM, gt=0, allow_inf_nan=False)
    join_timeout_s: float = Field(60.0, ge=0, allow_inf_nan=False)
    pause_s: float = Field(1.0, gt=0, allow_inf_nan=False)
    flower: FlowerCoordinator | None = None

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if (self.api_key_file is None) == (self.api_key_env is None):
            raise ValueError("give api_key_file or api_key_env, one of the two")
        try:
            parse_base_url(self.server)
            self.job_with(coordinator=_any_key(), adapter_digest=_NO_DIGEST)
        except InvalidRequestError as e:
            raise ValueError(e.message) from e
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file. Nothing is asked of a server.

        Raises:
            InvalidRequestError: naming the setting that is wrong.
        """
        path = Path(path)
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise _wrong(f"cannot read {path}: {e.strerror}", "a readable file") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise _wrong(f"{path} is not TOML: {e}", "TOML") from e
        folder = path.parent
        for name in ("identity", "state_dir", "api_key_file"):
            if isinstance(given.get(name), str):
                given[name] = folder / given[name]
        roster = given["job"].get("roster") if isinstance(given.get("job"), dict) else None
        if isinstance(roster, dict):
            given["job"]["roster"] = {site: _key_text(folder, site, text) for site, text in roster.items()}
        try:
            config = cls.model_validate(given)
        except ValidationError as e:
            raise _wrong(f"{path}: {_all(e)}", "the settings of coordinator.toml") from None
        return config if config.flower is None else config.model_copy(update={"flower": config.flower.under(folder)})

    def key(self) -> Ed25519PrivateKey:
        """The coordinator's identity.

        Raises:
            InvalidRequestError: no such file, or others can read it.
        """
        return load_identity(self.identity)

    def service(self, environ: Mapping[str, str] = os.environ) -> ServiceClient:
        """A client of the coordinator's own server. Nothing is sent yet.

        Raises:
            InvalidRequestError: there is no API key where the configuration says, or others can read its file.
        """
        if self.api_key_file is not None:
            api_key = read_secret(self.api_key_file).decode("ascii", errors="replace").strip()
            where = str(self.api_key_file)
        else:
            where = f"the environment variable {self.api_key_env}"
            api_key = environ.get(self.api_key_env or "", "").strip()
        if not api_key:
            raise _wrong(f"there is no API key in {where}", "an API key")
        return ServiceClient(api_key=api_key, base_url=self.server)

    def job_with(self, *, coordinator: Ed25519PrivateKey, adapter_digest: str) -> Job:
        """The whole job.

        Raises:
            InvalidRequestError: naming the field that is wrong.
        """
        if given := [name for name in ADDED if name in self.job]:
            raise _wrong(f"job.{given[0]} is filled in by the coordinator; leave it out", "left out")
        added = {"coordinator": public_text(coordinator), "adapter_digest": adapter_digest}
        try:
            return Job.model_validate({**self.job, **added})
        except ValidationError as e:
            raise _wrong(_all(e, within="job"), "the fields of a job") from None

    def is_of(self, job: Job, key: Ed25519PrivateKey) -> bool:
        """Whether a job is the one that this configuration and key ask for."""
        return self.job_with(coordinator=key, adapter_digest=job.adapter_digest) == job


def _any_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(32))


def _key_text(folder: Path, site: object, given: object) -> str:
    """A public key: itself, or the content of the file of that name."""
    if not isinstance(given, str):
        raise _wrong(f"job.roster.{site} is neither a public key nor the name of a file with one", "text")
    try:
        public_key(given)
        return given
    except InvalidRequestError:
        pass
    try:
        found = (folder / given).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise _wrong(
            f"job.roster.{site}: {given[:80]!r} is neither a public key (44 characters of base64) nor a "
            "readable file",
            "a public key",
        ) from e
    public_key(found)
    return found


def _all(error: ValidationError, within: str = "") -> str:
    """What is wrong and where, without what stands there: somebody may have pasted a key."""
    said = []
    for e in error.errors(include_input=False, include_url=False):
        where = ".".join(part for part in (within, *map(str, e["loc"])) if part)
        said.append(f"{where}{': ' if where else ''}{e['msg'].removeprefix('Value error, ')}")
    return "; ".join(said)


def _wrong(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="coordinator.toml", constraint=constraint)
