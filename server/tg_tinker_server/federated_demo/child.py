"""A command of ours as a child of the demo: ``python -m ...federated_demo.child PARENT serve ...``.

It ends when its parent does, however that died.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from tg_tinker.cli import main

_LOOK_S = 0.5
_PATIENCE_S = 10.0


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    main(sys.argv[2:])
