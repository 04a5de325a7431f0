"""Settings of one server: a TOML file, then environment variables; unknown names are refused."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.configs import CountOrAuto

ENVIRONMENT_PREFIX = "TG_TINKER_SERVER_"
SharePasses = Literal["tenant", "everyone", "off"]
DEFAULT_TINKER_PORT = 8000
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


class ServerConfig(BaseModel):
    """Everything an operator can set. docs/configuration.md is the long form.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        data_dir: home of the database, the artifacts and the root key unless they are named below.
        database_url: SQLAlchemy URL; default ``sqlite:///<data_dir>/tg-tinker.db``.
        artifacts_dir: folder of the ciphertexts; default ``<data_dir>/artifacts``.
        root_key: URI of the key that wraps every tenant's key; default ``file:<data_dir>/root.key``.
        tls_cert, tls_key: PEM files; with both, TLS is on. ``tls_client_ca`` demands client certificates.
        allow_plaintext_network: in so many words, permit an unencrypted listener off loopback.
        backend: "torch", or "bigram": a NumPy model for trying things out without torch.
        models: names offered to clients -> local folder or hub id; the bundled model is always there.
        device: where models live: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one.
        base_dtype: of frozen base weights; "auto" takes bfloat16 where a measurement finds it faster.
        sampler: what samples: "built-in", or "vllm" for what it can do and the built-in one for the rest.
        vllm_python: interpreter of the environment that has vLLM; default the one that runs this server.
        vllm_cache_gib: memory for vLLM's keys and values, of each base model that is sampled.
        max_queue: operations waiting per run before RATE_LIMITED.
        max_runs_per_tenant: active runs.
        max_batch_records, max_batch_tokens, max_request_bytes: limits of one request; tokens with padding.
        max_dataset_records, max_dataset_bytes: limits of one registered dataset.
        micro_batch_tokens: padded tokens in memory at once during a backward pass; "auto" finds them for each model.
        share_passes: whose waiting passes, and samples, may be computed together: those of one tenant, everyone's
            (tenants that trust each other), or nobody's.
        kept_results: results kept per run for ``get_future``.
        drain_s: seconds given to running work on SIGTERM.
        tinker_port: where to serve the Tinker protocol over HTTP, on ``host`` and with the same TLS files; port 0
            takes a free one, ``None`` serves none.
        tinker_gap_s: seconds that later requests of a model wait there for one that does not arrive.
        tinker_zstd: whether clients there shall compress their batches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535)
    data_dir: Path = Path(".tg-tinker")
    database_url: str = ""
    artifacts_dir: Path | None = None
    root_key: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    allow_plaintext_network: bool = False
    backend: Literal["torch", "bigram"] = "torch"
    models: dict[str, str] = Field(default_factory=dict)
    device: str = "auto"
    base_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    sampler: Literal["built-in", "vllm"] = "built-in"
    vllm_python: str = ""
    vllm_cache_gib: float = Field(4.0, gt=0, allow_inf_nan=False)
    max_queue: int = Field(256, ge=1)
    max_runs_per_tenant: int = Field(64, ge=1)
    max_batch_records: int = Field(4096, ge=1)
    max_batch_tokens: int = Field(2**19, ge=1)
    max_request_bytes: int = Field(64 * 2**20, ge=2**16)
    max_dataset_records: int = Field(5_000_000, ge=1)
    max_dataset_bytes: int = Field(2**30, ge=1)
    micro_batch_tokens: CountOrAuto = "auto"
    share_passes: SharePasses = "tenant"
    kept_results: int = Field(1000, ge=10)
    drain_s: float = Field(30.0, ge=0)
    tinker_port: int | None = Field(None, ge=0, le=65535)
    tinker_gap_s: float = Field(60.0, gt=0, allow_inf_nan=False)
    tinker_zstd: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "console"

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
            raise ValueError(f'"auto", "cpu", "cuda" or "cuda:1"; got {value!r}')
        return value

    @model_validator(mode="after")
    def _listener_is_safe(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.tls_cert is None and self.host not in LOOPBACK and not self.allow_plaintext_network:
            raise ValueError(
                f"refusing to listen on {self.host} without TLS: give tls_cert and tls_key, or set "
                "allow_plaintext_network = true if something in front of this server encrypts"
            )
        return self

    @model_validator(mode="after")
    def _sampler_fits_backend(self) -> Self:
        if self.sampler == "vllm" and self.backend != "torch":
            raise ValueError('sampler = "vllm" needs backend = "torch": the bigram has a sampler of its own')
        return self

    @property
    def resolved_database_url(self) -> str:
        """The database in use."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'tg-tinker.db').resolve()}"

    @property
    def resolved_artifacts_dir(self) -> Path:
        """The folder of ciphertexts in use."""
        return self.artifacts_dir or self.data_dir / "artifacts"

    @property
    def resolved_root_key(self) -> str:
        """The root key URI in use."""
        return self.root_key or f"file:{(self.data_dir / 'root.key').resolve()}"

    @classmethod
    def load(cls, path: Path | None, environ: Mapping[str, str] = os.environ, **overrides: Any) -> ServerConfig:
        """Read the TOML file, then ``TG_TINKER_SERVER_*``, then explicit overrides; later wins.

        Raises:
            InvalidRequestError: an unknown or impossible setting, named.
        """
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values.update(tomllib.loads(path.read_text()))
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
                raise InvalidRequestError(f"cannot read {path}: {e}", field="config", constraint="TOML") from e
        for name, text in environ.items():
            if name == ENVIRONMENT_PREFIX + "MODELS":
                raise InvalidRequestError(
                    f"{name}: models is a table, which only the TOML file can hold; write [models] there",
                    field="models",
                    constraint="in the TOML file",
                )
            if name.startswith(ENVIRONMENT_PREFIX):
                values[name.removeprefix(ENVIRONMENT_PREFIX).lower()] = text
        values.update({k: v for k, v in overrides.items() if v is not None})
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            problems = "; ".join(
                f"{'.'.join(map(str, p['loc'])) or 'config'}: {p['msg'].removeprefix('Value error, ')}"
                for p in e.errors()
            )
            raise InvalidRequestError(
                f"server configuration: {problems}", field="config", constraint="known settings only"
            ) from e
