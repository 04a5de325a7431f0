"""A site's configuration: one TOML file, read once, unknown keys refused.

    site = "north"                        # its name on the job's roster
    server = "127.0.0.1:50051"            # its own tg-tinker server
    api_key_file = "north.api-key"        # or api_key_env = "NORTH_API_KEY"; roles trainer, exporter and auditor
    dataset = "icd10"                     # registered there with service.create_dataset
    identity = "north.key"                # made by `tg-tinker federated keygen`
    state_dir = "north-state"             # what it remembers between messages

    [policy]                              # what it agrees to: policy.py
    coordinator = "base64 of its public key"
    base_models = ["tiny-llama-2m"]

    [flower]                              # how it reaches the coordinator: flower_settings.FlowerSite

Paths are relative to the file's folder.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tg_tinker._endpoint import parse_base_url
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.flower_settings import FlowerSite
from tg_tinker.federated.job import SiteName
from tg_tinker.federated.keys import load_identity, read_secret
from tg_tinker.federated.link import Handler
from tg_tinker.federated.policy import SitePolicy
from tg_tinker.service_client import ServiceClient

ENVIRONMENT = "TG_TINKER_SITE_CONFIG"
"""Names the file for `handler_from_environment`."""


class SiteConfig(BaseModel):
    """Where a site's server, data, identity and state are, and what the site agrees to.

    Attributes:
        server: as ``ServiceClient(base_url=...)``; certificates for TLS come from ``TG_TINKER_TLS_*``.
        api_key_file: a file of mode 0600 with the key, or
        api_key_env: the name of the environment variable that holds it. The key itself is never in the
            configuration, and never in a log.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteName
    server: str
    dataset: str = Field(min_length=1, max_length=200)
    identity: Path
    state_dir: Path
    api_key_file: Path | None = None
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    policy: SitePolicy
    flower: FlowerSite | None = None

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if (self.api_key_file is None) == (self.api_key_env is None):
            raise ValueError("give api_key_file or api_key_env, one of the two")
        try:
            parse_base_url(self.server)
        except InvalidRequestError as e:
            raise ValueError(e.message) from e
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            InvalidRequestError: it cannot be read, is no TOML, or has a key or value that cannot be, named.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                values = tomllib.load(file)
        except OSError as e:
            raise _refused(f"cannot read the site's configuration {path}: {e.strerror}") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise _refused(f"{path} is not TOML: {e}") from e
        for name in ("identity", "state_dir", "api_key_file"):
            if isinstance(values.get(name), str):
                values[name] = path.parent / values[name]
        try:
            config = cls.model_validate(values)
        except ValidationError as e:
            # What stands there is not repeated: somebody may have pasted a key.
            errors = [
                f"{'.'.join(map(str, error['loc'])) or 'the file'}: {error['msg'].removeprefix('Value error, ')}"
                for error in e.errors(include_input=False, include_url=False)
            ]
            raise _refused(f"{path}: {'; '.join(errors)}") from None
        return (
            config
            if config.flower is None
            else config.model_copy(update={"flower": config.flower.under(path.parent)})
        )

    def key(self) -> Ed25519PrivateKey:
        """The site's identity.

        Raises:
            InvalidRequestError: see `load_identity`.
        """
        return load_identity(self.identity)

    def service(self, environ: Mapping[str, str] = os.environ) -> ServiceClient:
        """A client of the site's own server. Nothing is sent yet.

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
            raise _refused(f"there is no API key in {where}")
        return ServiceClient(api_key=api_key, base_url=self.server)


def handler_from_environment(environ: Mapping[str, str] = os.environ) -> Handler:
    """The handler of the site whose configuration the variable ``TG_TINKER_SITE_CONFIG`` names.

    Raises:
        InvalidRequestError: the variable is not set, or the configuration cannot be used.
    """
    from tg_tinker.federated.site import Site

    path = environ.get(ENVIRONMENT)
    if not path:
        raise _refused(f"set {ENVIRONMENT} to the path of the site's configuration (site.toml)")
    config = SiteConfig.load(path)
    return Site(config, config.service(environ), config.key()).handle


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="site.toml", constraint="a site's configuration")
