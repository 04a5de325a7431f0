"""The two Flower apps: thin shells around a site's handler and a coordinator's run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.flower.link import APP_FAILED, FlowerLink
from tg_tinker.federated.flower.records import MESSAGE_TYPE, from_content, to_content
from tg_tinker.federated.link import CoordinatorLink, Handler


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
