"""What every party's configuration file has: its own server, an API key for it, its identity, its state folder.

One TOML file, read once, unknown keys refused. Paths are relative to the file's folder. Messages name a setting and
never what stands there: somebody may have pasted a key.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tg_tinker._endpoint import parse_base_url
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.flower_settings import FlowerCoordinator, FlowerSite
from tg_tinker.federated.keys import load_identity, read_secret
from tg_tinker.service_client import ServiceClient


class PartyConfig(BaseModel):
    """One party's own things.

    Attributes:
        server: as ``ServiceClient(base_url=...)``; certificates for TLS come from ``TG_TINKER_TLS_*``.
        api_key_file: a file of mode 0600 with the key, or
        api_key_env: the name of the environment variable that holds it. The key itself is never in the
            configuration, and never in a log.
        identity: file of the party's private key.
        state_dir: what the party remembers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    FILE: ClassVar[str]

    server: str
    identity: Path
    state_dir: Path
    api_key_file: Path | None = None
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if (self.api_key_file is None) == (self.api_key_env is None):
            raise ValueError("give api_key_file or api_key_env, one of the two")
        try:
            parse_base_url(self.server)
        except InvalidRequestError as e:
            raise ValueError(e.message) from e
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file. Nothing is asked of a server.

        Raises:
            InvalidRequestError: it cannot be read, is no TOML, or has a setting that cannot be, named.
        """
        path = Path(path)
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise cls.wrong(f"cannot read {path}: {e.strerror}", "a readable file") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise cls.wrong(f"{path} is not TOML: {e}", "TOML") from e
        for name in ("identity", "state_dir", "api_key_file"):
            if isinstance(given.get(name), str):
                given[name] = path.parent / given[name]
        cls._prepare(given, path.parent)
        try:
            config = cls.model_validate(given)
        except ValidationError as e:
            raise cls.wrong(f"{path}: {what_is_wrong(e)}", f"the settings of {cls.FILE}") from None
        flower: FlowerSite | FlowerCoordinator | None = getattr(config, "flower", None)
        return config if flower is None else config.model_copy(update={"flower": flower.under(path.parent)})

    @classmethod
    def _prepare(cls, given: dict[str, Any], folder: Path) -> None:
        """Read what other files the values name; for those who have such."""

    @classmethod
    def wrong(cls, message: str, constraint: str) -> InvalidRequestError:
        """The error of a file of this kind."""
        return InvalidRequestError(message, field=cls.FILE, constraint=constraint)

    def key(self) -> Ed25519PrivateKey:
        """The party's identity.

        Raises:
            InvalidRequestError: no such file, or others can read it.
        """
        return load_identity(self.identity)

    def service(self, environ: Mapping[str, str] = os.environ) -> ServiceClient:
        """A client of the party's own server. Nothing is sent yet.

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
            raise self.wrong(f"there is no API key in {where}", "an API key")
        return ServiceClient(api_key=api_key, base_url=self.server)


def what_is_wrong(error: ValidationError, within: str = "") -> str:
    """What is wrong and where, without what stands there."""
    said = []
    for e in error.errors(include_input=False, include_url=False):
        where = ".".join(part for part in (within, *map(str, e["loc"])) if part)
        said.append(f"{where}{': ' if where else ''}{e['msg'].removeprefix('Value error, ')}")
    return "; ".join(said)
