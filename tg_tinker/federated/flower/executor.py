"""Executors: processes of a party that take Flower's tasks and run the app which that party installed.

A site's lives as long as the site: it imports once, keeps its connections, and handles one message after another.
Flower's executors import code from the bundle that a run brings; these never open it, and take no other kind of task.

What stays: a SuperNode still parses what the SuperLink sends (HTTP, protobuf, the settings in a bundle's
pyproject.toml), and this process parses the message (protobuf, then `records`). A fault in that code could be used by
whoever controls the SuperLink. Run the SuperNode as another user or in a container (`FlowerSite.supernode`), so that
it reaches neither keys nor data; what it hands on is checked by signature before anything is done.
"""

from __future__ import annotations

import logging
import threading
import time

from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.constant import TaskType

from tg_tinker.errors import ServerError
from tg_tinker.federated.flower.internals import Endpoint, Tasks, answer, coordinator_task, site_task
from tg_tinker.federated.flower.link import APP_FAILED

_log = logging.getLogger("tg_tinker")
_POLL_S = 0.2
_AFTER_TROUBLE_S = 1.0


def serve_site(endpoint: Endpoint, app: ClientApp, stop: threading.Event) -> None:
    """Hand a SuperNode's messages to ``app`` until ``stop`` is set. A SuperNode that is away is waited for."""
    tasks = Tasks(endpoint, TaskType.CLIENT_APP)
    try:
        while not stop.is_set():
            try:
                token = tasks.next()
            except ServerError as e:
                _log.debug("%s", e)
                stop.wait(_AFTER_TROUBLE_S)
                continue
            if token:
                _handle(endpoint, token, app)
            else:
                stop.wait(_POLL_S)
    finally:
        tasks.close()


def _handle(endpoint: Endpoint, token: str, app: ClientApp) -> None:
    try:
        with site_task(endpoint, token) as (message, context, client):
            try:
                reply = app(message=message, context=context)
            except Exception as e:  # noqa: BLE001 - whatever an app raises
                # The kind of the error only: its text may speak of records.
                _log.error("a request could not be handled: %s", type(e).__name__)
                reply = Message(Error(APP_FAILED, type(e).__name__), reply_to=message)
            answer(client, reply, context)
    except Exception as e:  # noqa: BLE001 - one message that cannot be taken or answered is no reason to stop
        _log.warning("a message was lost between this site and its SuperNode: %s", e)


def serve_run(endpoint: Endpoint, app: ServerApp, *, timeout_s: float) -> None:
    """Take the run that was started and be its ServerApp, in this process, to its end.

    Raises:
        ServerError: no run was given out in time.
    """
    tasks = Tasks(endpoint, TaskType.SERVER_APP)
    deadline = time.monotonic() + timeout_s
    try:
        while not (token := tasks.next()):
            if time.monotonic() > deadline:
                raise ServerError("the SuperLink gave out no run; its log says why")
            time.sleep(_POLL_S)
    finally:
        tasks.close()
    with coordinator_task(endpoint, token) as (grid, context):
        app(grid=grid, context=context)
