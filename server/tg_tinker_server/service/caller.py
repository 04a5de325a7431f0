"""Who calls, and what their roles allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tg_tinker.errors import AuthenticationError, AuthorizationError, InvalidRequestError
from tg_tinker.types import TrainingConfig
from tg_tinker_server.crypto import api_keys
from tg_tinker_server.service.policy import KeyPolicy, refuse_by_policy
from tg_tinker_server.store import key_rows
from tg_tinker_server.store.database import Database

SCOPES_OF_ROLE: dict[str, frozenset[str]] = {
    "trainer": frozenset({"READ", "TRAIN", "SAMPLE"}),
    "sampler": frozenset({"READ", "SAMPLE"}),
    "exporter": frozenset({"READ", "EXPORT"}),
    "auditor": frozenset({"READ", "AUDIT"}),
    "budget_officer": frozenset({"READ", "AUDIT", "BUDGET"}),
    "admin": frozenset({"READ"}),  # manages keys on the server's machine; can neither train nor export
}
HOW_TO_GET_A_KEY = "create one on the server with `tg-tinker keys create` and set TG_TINKER_API_KEY"
_CACHE_S = 0.5  # a revoked key stops working within a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """An authenticated key. ``tenant`` is part of every key in every table; ``policy`` is all that it may see."""

    tenant: str
    key_id: str
    scopes: frozenset[str]
    policy: KeyPolicy | None = None

    def sees(self, config: TrainingConfig) -> bool:
        """Whether a run of this configuration exists for the key."""
        return self.policy is None or self.policy.admits(config)

    def refuse_policy(self, what: str) -> None:
        """Refuse what a key with a policy may not do at all.

        Raises:
            AuthorizationError: it has one.
        """
        if self.policy is not None:
            raise refuse_by_policy(what)

    def require(self, scope: str) -> None:
        """Refuse a call that the key's roles do not allow.

        Raises:
            AuthorizationError: naming the scope and the roles that carry it.
        """
        if scope not in self.scopes:
            roles = sorted(r for r, s in SCOPES_OF_ROLE.items() if scope in s)
            raise AuthorizationError(
                f"this key may not {scope.lower()}; use a key with one of the roles {', '.join(roles)}",
                details={"scope": scope.lower(), "roles": roles},
            )


def check_roles(roles: tuple[str, ...]) -> None:
    """Refuse unknown roles.

    Raises:
        InvalidRequestError: naming them and the known ones.
    """
    unknown = [r for r in roles if r not in SCOPES_OF_ROLE]
    if unknown or not roles:
        raise InvalidRequestError(
            f"unknown roles {unknown}; known: {', '.join(SCOPES_OF_ROLE)}",
            field="roles",
            constraint=", ".join(SCOPES_OF_ROLE),
        )


def caller_of(row: key_rows.ApiKeyRow) -> Caller:
    """Who calls with a key whose secret was verified, and what its roles and its policy allow."""
    scopes = frozenset().union(*(SCOPES_OF_ROLE.get(r, frozenset()) for r in row.roles))
    policy = None if row.policy is None else KeyPolicy.from_json(row.policy)
    return Caller(tenant=row.tenant, key_id=row.key_id, scopes=scopes, policy=policy)


class Authenticator:
    """Turns a bearer token into a Caller. Keys are compared by MAC, in constant time."""

    def __init__(self, db: Database, pepper: bytes, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._pepper = pepper
        self._monotonic = monotonic
        self._seen: dict[str, tuple[float, key_rows.ApiKeyRow | None]] = {}

    def cached(self, token: str, tenant: str | None) -> Caller | None:
        """The caller if the key's row is fresh in memory; ``None`` means: ask :meth:`authenticate`, off the loop."""
        parsed = api_keys.parse(token)
        seen = self._seen.get(parsed.key_id)
        if seen is None or self._monotonic() - seen[0] > _CACHE_S:
            return None
        return self._judge(parsed, seen[1], tenant)

    def authenticate(self, token: str, tenant: str | None) -> Caller:
        """Read the key's row and judge it.

        Raises:
            AuthenticationError: missing, malformed, unknown or revoked key; one message for the last two.
            AuthorizationError: the key belongs to another tenant than the one asked for.
        """
        parsed = api_keys.parse(token)
        row = self._db.read(lambda tx: key_rows.get_api_key(tx, parsed.key_id))
        if len(self._seen) > 10_000:
            self._seen.clear()
        self._seen[parsed.key_id] = (self._monotonic(), row)
        return self._judge(parsed, row, tenant)

    def _judge(self, parsed: api_keys.ApiKey, row: key_rows.ApiKeyRow | None, tenant: str | None) -> Caller:
        mac = row.mac if row is not None else bytes(32)
        valid = api_keys.matches(parsed, self._pepper, mac)
        if row is None or not valid or row.revoked is not None:
            raise AuthenticationError(f"the API key is not known or was revoked; {HOW_TO_GET_A_KEY}")
        if tenant is not None and tenant != row.tenant:
            raise AuthorizationError("this API key belongs to another tenant; leave tenant_id out or correct it")
        return caller_of(row)
