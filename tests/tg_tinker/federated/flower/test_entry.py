"""A SuperLink's Control and Runtime APIs answer this computer only."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from tg_tinker.federated.flower.entry import LocalOnly


def ask(
    path: str, client: tuple[str, int] | None, server: tuple[str, int] = ("10.0.0.1", 8000), kind: str = "http"
) -> str:
    """What becomes of a request: "passed", or the refusal."""
    said: list[str] = []

    async def app(scope: MutableMapping[str, Any], receive: object, send: object) -> None:
        said.append("passed")

    async def receive() -> MutableMapping[str, Any]:
        return {}

    async def send(message: MutableMapping[str, Any]) -> None:
        if "status" in message or "code" in message:
            said.append(str(message.get("status", message.get("code"))))

    scope = {"type": kind, "path": path, "client": client, "server": server}
    asyncio.run(LocalOnly(app)(scope, receive, send))
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize(
    "path",
    ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/", "", "/v1/fleet", "/v1/control/../fleet/"],
)
@pytest.mark.parametrize(
    "client", [("203.0.113.9", 4), ("10.0.0.2", 4), ("::ffff:203.0.113.9", 4), ("unix", 0), None]
)
def test_others_reach_nothing_but_the_fleet_api(path: str, client: tuple[str, int] | None) -> None:
    assert ask(path, client) == "403"
    assert ask(path, client, kind="websocket") == "1008"


@pytest.mark.parametrize(
    "client", [("127.0.0.1", 4), ("127.8.8.8", 4), ("::1", 4), ("::ffff:127.0.0.1", 4), ("10.0.0.1", 4)]
)
def test_this_computer_reaches_all(client: tuple[str, int]) -> None:
    assert ask("/v1/control/start-run", client) == "passed"


def test_sites_reach_the_fleet_api_and_health() -> None:
    assert ask("/v1/fleet/activate-node", ("203.0.113.9", 4)) == "passed"
    assert ask("/health", ("203.0.113.9", 4)) == "passed"
