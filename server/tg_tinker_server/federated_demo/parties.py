"""Who takes part: each party's folder with its server's data, its keys, and the configuration file it would write.

    <folder>/clinic/site.toml               what a hospital's operator writes
    <folder>/clinic/server/                 its tg-tinker server: records, ledger, keys; nobody else's
    <folder>/coordinator/coordinator.toml   what the coordinator writes

One person plays all of them here; nothing of one party's folder is used by another but public keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tg_tinker import ServiceClient
from tg_tinker.federated.keys import load_identity, make_identity, public_text, read_secret, write_secret
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.federated_demo.settings import DATASET, FederatedDemoSettings
from tg_tinker_server.foundation import Foundation

ROLES = ("trainer", "exporter", "auditor")
COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Party:
    """One party's files. ``address`` is where its server listens now; "" before it runs."""

    name: str
    folder: Path
    address: str = ""

    @property
    def data_dir(self) -> Path:
        """Home of its server's database, artifacts and root key."""
        return self.folder / "server"

    @property
    def identity(self) -> Path:
        """File of its private key."""
        return self.folder / "identity.key"

    @property
    def api_key(self) -> Path:
        """File of the key that its app shows its own server."""
        return self.folder / "api-key"

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.folder / ("coordinator.toml" if self.name == COORDINATOR else "site.toml")

    def prepare(self) -> None:
        """Make its keys, where they are missing. Its server must not run."""
        if not self.identity.exists():
            make_identity(self.identity)
        if not self.api_key.exists():
            foundation = Foundation.open(ServerConfig(data_dir=self.data_dir))
            try:
                write_secret(self.api_key, foundation.desk.mint(self.name, ROLES, "federated demo").encode("ascii"))
            finally:
                foundation.db.close()

    def public_key(self) -> str:
        """What others know it by."""
        return public_text(load_identity(self.identity))

    def client(self) -> ServiceClient:
        """A client of its own server."""
        return ServiceClient(api_key=read_secret(self.api_key).decode("ascii"), base_url=self.address)


def parties(folder: Path, sites: Sequence[str]) -> dict[str, Party]:
    """Every party, with its keys made."""
    found = {name: Party(name, folder / name) for name in (COORDINATOR, *sites)}
    for party in found.values():
        party.prepare()
    return found


def write_site(
    party: Party,
    settings: FederatedDemoSettings,
    *,
    coordinator: str,
    flower: Mapping[str, Any],
    public_units: int | None = None,
) -> None:
    """Write a site's ``site.toml``. The policy allows this demo's job and nothing larger.

    Args:
        coordinator: its public key.
        flower: how the SuperLink is reached; empty where everything runs in one process.
        public_units: see `SitePolicy`; ``None`` leaves it out.
    """
    tables: dict[str, Mapping[str, Any]] = {
        "": {
            "site": party.name,
            "server": party.address,
            "api_key_file": party.api_key.name,
            "dataset": DATASET,
            "identity": party.identity.name,
            "state_dir": "state",
        },
        "policy": {
            "coordinator": coordinator,
            "base_models": [settings.model_ref],
            "max_record_tokens": 256,
            "max_rounds": settings.rounds,
            "max_local_steps": settings.local_steps,
            "max_epsilon": settings.target_epsilon,
            "max_delta": settings.target_delta,
            "min_sites": 2,
            **({"public_units": public_units} if public_units else {}),
            # So that anybody can compute epsilon again. The rate that is told is that of the public size.
            "disclose_accounting": True,
        },
    }
    party.config.write_text(toml({**tables, **({"flower": flower} if flower else {})}), encoding="utf-8")


def public_units(party: Party) -> int | None:
    """What a site says in public of its size: thousands, rounded down; ``None`` leaves it to the policy's default."""
    with party.client() as service:
        return service.get_dataset(DATASET).num_slots // 1000 * 1000 or None


def write_coordinator(party: Party, job: Mapping[str, Any], *, flower: Mapping[str, Any]) -> None:
    """Write ``coordinator.toml``.

    Args:
        job: with its roster.
        flower: how the SuperLink is run; empty where everything runs in one process.
    """
    tables: dict[str, Mapping[str, Any]] = {
        "": {
            "server": party.address,
            "api_key_file": party.api_key.name,
            "identity": party.identity.name,
            "state_dir": "state",
            "join_timeout_s": 120.0,
            "pause_s": 0.5,
        },
        "job": {name: value for name, value in job.items() if not isinstance(value, Mapping)},
        **{f"job.{name}": value for name, value in job.items() if isinstance(value, Mapping)},
    }
    flower_tables: dict[str, Mapping[str, Any]] = {}
    if flower:
        flower_tables["flower"] = {name: value for name, value in flower.items() if not isinstance(value, Mapping)}
        flower_tables |= {f"flower.{name}": value for name, value in flower.items() if isinstance(value, Mapping)}
    party.config.write_text(toml({**tables, **flower_tables}), encoding="utf-8")


def toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML of flat tables; "" is the part above the first one.

    >>> print(toml({"": {"site": "north"}, "policy": {"max_rounds": 5, "base_models": ["a"], "strict": True}}))
    site = "north"
    <BLANKLINE>
    [policy]
    max_rounds = 5
    base_models = ["a"]
    strict = true
    <BLANKLINE>
    """
    blocks = []
    for name, values in tables.items():
        head = [f"[{name}]"] if name else []
        blocks.append("\n".join([*head, *(f"{key} = {_value(value)}" for key, value in values.items())]))
    return "\n\n".join(blocks) + "\n"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
