"""What every test needs: a data folder that is not the user's, and a Ctrl-C that reaches the programs it starts."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def data_folder() -> Iterator[None]:
    """A data folder for the client, inherited by child processes."""
    with tempfile.TemporaryDirectory(prefix="tg-tinker-data-") as folder:
        before = os.environ.get("TG_TINKER_DATA_DIR")
        os.environ["TG_TINKER_DATA_DIR"] = folder
        yield
        if before is None:
            del os.environ["TG_TINKER_DATA_DIR"]
        else:
            os.environ["TG_TINKER_DATA_DIR"] = before
