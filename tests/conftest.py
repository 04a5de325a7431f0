"""What every test needs: what servers showed is remembered in a folder of the test run, not in the user's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest


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
