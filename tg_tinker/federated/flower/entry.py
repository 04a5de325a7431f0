"""Flower's own long-running programs, started as children of ours: ``python -m ...flower.entry superlink ...``.

Two additions to the programs as installed. They end when their parent does, however it died. And a SuperLink answers
its Control and Runtime APIs to this computer only: they share their port with the Fleet API that sites need, and
without an account server anybody who reaches the Control API may start runs and register nodes.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

OPEN_TO_ALL = ("/v1/fleet/", "/health")
"""What sites need. Paths are compared as the SuperLink's router sees them."""
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Scope]]
_Send = Callable[[_Scope], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class LocalOnly:
    """ASGI middleware: requests from other computers reach the paths of `OPEN_TO_ALL` only; others get 403."""

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or scope["path"].startswith(OPEN_TO_ALL) or _is_local(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"this part of the SuperLink answers locally only"})
        else:
            await send({"type": "websocket.close", "code": 1008})


def _is_local(scope: _Scope) -> bool:
    """Whether the connection comes from this computer: over loopback, or from the address that it goes to."""
    client, server = scope.get("client"), scope.get("server")
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or bool(client and server and client[0] == server[0])


def _end_with(parent: int) -> None:
    """Stop this program when its parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run the program named by the first argument, whose parent is the second."""
    name, parent = sys.argv[1], int(sys.argv[2])
    sys.argv = [f"flower-{name}", *sys.argv[3:]]
    _end_with(parent)
    if name == "superlink":
        from flwr.superlink import extensions
        from flwr.superlink.cli import flower_superlink

        extensions.get_middleware = lambda: (Middleware(LocalOnly),)
        flower_superlink()
    else:
        from flwr.supernode.cli import flower_supernode

        flower_supernode()


if __name__ == "__main__":
    main()
