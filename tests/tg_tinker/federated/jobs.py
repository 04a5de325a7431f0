"""Jobs and keys for tests: the same in every run."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import public_text


def key_of(name: str) -> Ed25519PrivateKey:
    """A party's key, made from its name."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def names(count: int) -> list[str]:
    """site-0, site-1, ..."""
    return [f"site-{i}" for i in range(count)]


def make_job(*, sites: int = 3, **settings: Any) -> Job:
    """A job over so many sites; anything may be set otherwise."""
    defaults: dict[str, Any] = {
        "job_id": "job",
        "base_model": "bigram",
        "rounds": 2,
        "batch_size": 4,
        "records": None,
        "roster": {name: public_text(key_of(name)) for name in names(sites)},
        "coordinator": public_text(key_of("coordinator")),
        "expires": datetime(2100, 1, 1, tzinfo=UTC),
        "adapter_digest": "0" * 64,
    }
    overridden = {"sites_privacy": "sites"}
    return Job(**{**defaults, **{overridden.get(name, name): value for name, value in settings.items()}})
