"""The two Flower apps: thin shells around a site's handler and a coordinator's run.

`site_app` and `coordinator_app` are whole: they read the configuration that their owner names in the environment.
What a message says never chooses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from tg_tinker.errors import FederationRefusedError, InvalidRequestError, ServerError
from tg_tinker.federated.flower.link import APP_FAILED, FlowerLink
from tg_tinker.federated.flower.records import MESSAGE_TYPE, from_content, to_content
from tg_tinker.federated.link import CoordinatorLink, Handler
from tg_tinker.federated.messages import Envelope

COORDINATOR_ENVIRONMENT = "TG_TINKER_COORDINATOR_CONFIG"
"""Names coordinator.toml for `coordinator_app`; a site's variable is `site_config.ENVIRONMENT`."""


def client_app(handler: Handler) -> ClientApp:
    """A ClientApp that hands every request to ``handler``.

    What cannot be read is answered with an error and never reaches the handler.
    """
    app = ClientApp()

    @app.query(MESSAGE_TYPE.removeprefix("query."))
    def answer(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower hands it over
        try:
            request = from_content(message.content)
        except FederationRefusedError as e:
            return Message(Error(APP_FAILED, e.message), reply_to=message)
        return Message(to_content(handler(request)), reply_to=message)

    return app


def server_app(
    run: Callable[[CoordinatorLink], None],
    *,
    roster: Mapping[str, str],
    key: Ed25519PrivateKey,
    poll_s: float = 0.5,
    ended: Callable[[], str] = lambda: "",
) -> ServerApp:
    """A ServerApp that hands ``run`` a link to the sites of ``roster``; see `FlowerLink` for the other arguments."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower hands it over
        run(FlowerLink(grid, roster=roster, key=key, poll_s=poll_s, ended=ended))

    return app


@cache
def _own_handler() -> Handler:
    from tg_tinker.federated.site_config import handler_from_environment

    return handler_from_environment()


def _handle(request: Envelope) -> Envelope:
    return _own_handler()(request)


def _coordinate(grid: Grid, context: Context) -> None:
    from tg_tinker.federated.coordinator import Coordinator
    from tg_tinker.federated.coordinator_config import CoordinatorConfig

    path = os.environ.get(COORDINATOR_ENVIRONMENT)
    if not path:
        raise InvalidRequestError(
            f"set {COORDINATOR_ENVIRONMENT} to the path of coordinator.toml", field=COORDINATOR_ENVIRONMENT
        )
    config = CoordinatorConfig.load(path)
    key = config.key()
    coordinator = Coordinator(config, config.service(), key)
    roster = coordinator.prepare().roster

    def run(link: CoordinatorLink) -> None:
        result = coordinator.run(link)
        if result.status == "failed":
            raise ServerError(f"the job failed: {result.why}")

    server_app(run, roster=roster, key=key)(grid=grid, context=context)


site_app = client_app(_handle)
"""The ClientApp of the site whose configuration ``TG_TINKER_SITE_CONFIG`` names; read at the first message."""
coordinator_app = ServerApp()
"""The ServerApp of the coordinator whose configuration ``TG_TINKER_COORDINATOR_CONFIG`` names."""
coordinator_app.main()(_coordinate)
