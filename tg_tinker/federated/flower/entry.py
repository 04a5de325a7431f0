"""Flower's own long-running programs, started as children of ours: ``python -m ...flower.entry superlink ...``.

Three additions to the programs as installed. They end when their parent does, however it died. A SuperLink answers
its Control and Runtime APIs to this computer only: they share their port with the Fleet API that sites need, and
without an account server anybody who reaches the Control API may start runs and register nodes. And it reads long
bodies from this computer and registered nodes only, see `bodies`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
import threading
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from starlette.middleware import Middleware

from tg_tinker.federated.flower.bodies import App, LimitedBodies, Receive, Scope, Send

NODE_KEY, LARGEST_BODY = "--tg-tinker-node-key", "--tg-tinker-largest-body"
"""Our own options of a SuperLink: a file with a node's public key in OpenSSH form, repeated; bytes."""
OPEN_TO_ALL = ("/v1/fleet/", "/health")
"""What sites need. Paths are compared as the SuperLink's router sees them."""


class LocalOnly:
    """ASGI middleware: requests from other computers reach the paths of `OPEN_TO_ALL` only; others get 403."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or scope["path"].startswith(OPEN_TO_ALL) or _is_local(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"this part of the SuperLink answers locally only"})
        else:
            await send({"type": "websocket.close", "code": 1008})


def _is_local(scope: Scope) -> bool:
    """Whether the connection comes from this computer: over loopback, or from the address that it goes to."""
    client, server = scope.get("client"), scope.get("server")
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or bool(client and server and client[0] == server[0])


def _is_of_the_coordinator(scope: Scope) -> bool:
    """Whether a request may be one of the coordinator's own: nodes prove themselves, wherever they run."""
    return not scope["path"].startswith(OPEN_TO_ALL) and _is_local(scope)


def _keys(paths: list[Path]) -> list[EllipticCurvePublicKey]:
    keys = [load_ssh_public_key(path.read_bytes()) for path in paths]
    return [key for key in keys if isinstance(key, EllipticCurvePublicKey)]


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
    ours = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    ours.add_argument(NODE_KEY, action="append", type=Path, default=[], dest="node_keys")
    ours.add_argument(LARGEST_BODY, type=int, default=2**31, dest="largest")
    own, flowers = ours.parse_known_args(sys.argv[3:])
    sys.argv = [f"flower-{name}", *flowers]
    _end_with(parent)
    if name == "superlink":
        from flwr.superlink import extensions
        from flwr.superlink.cli import flower_superlink

        limits = Middleware(
            LimitedBodies, node_keys=_keys(own.node_keys), largest=own.largest, trusted=_is_of_the_coordinator
        )
        extensions.get_middleware = lambda: (Middleware(LocalOnly), limits)
        flower_superlink()
    else:
        from flwr.supernode.cli import flower_supernode

        flower_supernode()


if __name__ == "__main__":
    main()
