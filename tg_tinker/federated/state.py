"""What the coordinator keeps on disk: enough to go on from the last released round after a kill at any moment.

    state.json                  the job, its course, which artifact holds the adapter; replaced as a whole
    moments-<round>.safetensors what FedAdam and FedYogi remember; named, with its digest, in state.json
    lock                        held while a coordinator works here

The adapter itself is an encrypted artifact at the coordinator's server. A file is on disk before another names it, so
``state.json`` never points at what is not there; files that it does not name are left over and removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.federated.aggregation import Moments
from tg_tinker.federated.job import Job
from tg_tinker.federated.rounds import Course
from tg_tinker.tensor_file import FormatError, read_tensors, write_tensors

STATE, RESULT, LOCK = "state.json", "result.json", "lock"
_MOMENTS = "moments-{}.safetensors"


class Saved(BaseModel):
    """The content of ``state.json``.

    Attributes:
        course: with everything that was released.
        adapter: artifact of the adapter after the last released round, or of the first one.
        adapter_digest: of its weights.
        bound: clipping bound of the next round, under site-level privacy.
        moments: file of what the strategy remembers, and its SHA-256; empty where there is nothing.
        first_metrics: what the evaluation found before the first round.
        statements: signed by sites at the end, by site.
        unstated: why a site gave none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["tg-tinker/federated-coordinator/v1"] = "tg-tinker/federated-coordinator/v1"
    job: Job
    course: Course
    adapter: str
    adapter_digest: str
    bound: float | None = None
    moments: str = ""
    moments_digest: str = ""
    first_metrics: dict[str, float] = Field(default_factory=dict)
    statements: dict[str, dict[str, Any]] = Field(default_factory=dict)
    unstated: dict[str, str] = Field(default_factory=dict)


class StateFolder:
    """The folder of one job. One process at a time works in it.

    Raises:
        InvalidRequestError: another coordinator works in it, or what is in it cannot be read.
        ServerError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ServerError(f"cannot write the coordinator's folder {path}: {e.strerror}") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InvalidRequestError(
                f"another coordinator works in {path}; stop it first, or give this one a folder of its own",
                field="state_dir",
                constraint="used by one coordinator",
            ) from None

    def close(self) -> None:
        """Let others work here."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> tuple[Saved, Moments] | None:
        """What was saved last, or ``None`` in a new folder.

        Raises:
            InvalidRequestError: it is damaged.
        """
        text = self._read(STATE)
        if text is None:
            return None
        try:
            saved = Saved.model_validate_json(text)
        except ValidationError as e:
            raise self._damaged(STATE) from e
        if not saved.moments:
            return saved, Moments()
        data = self._read(saved.moments)
        if data is None or hashlib.sha256(data).hexdigest() != saved.moments_digest:
            raise self._damaged(saved.moments)
        return saved, _moments(data, self._damaged(saved.moments))

    def save(self, saved: Saved, moments: Moments | None = None) -> Saved:
        """Put a state on disk, whole or not at all; returns it as it was written.

        Args:
            moments: new ones; ``None`` keeps those that the state names.
        """
        if moments is not None and moments:
            file = _MOMENTS.format(len(saved.course.released))
            parts = {"m": moments.m, "v": moments.v}
            arrays = {f"{part}/{name}": value for part, kept in parts.items() for name, value in kept.items()}
            data = b"".join(write_tensors(arrays, {}))
            self._write(file, data)
            saved = saved.model_copy(update={"moments": file, "moments_digest": hashlib.sha256(data).hexdigest()})
        self._write(STATE, saved.model_dump_json(indent=1).encode())
        self._sweep({saved.moments})
        return saved

    def write_result(self, text: str) -> None:
        """Put the result beside the state, for people and reports."""
        self._write(RESULT, text.encode())

    def _sweep(self, named: Iterable[str]) -> None:
        for found in self.path.glob(_MOMENTS.format("*")):
            if found.name not in named:
                found.unlink(missing_ok=True)

    def _read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise ServerError(f"cannot read {self.path / name}: {e.strerror}") from e

    def _write(self, name: str, data: bytes) -> None:
        try:
            descriptor, draft = tempfile.mkstemp(dir=self.path, prefix=".new-")  # mode 0600
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(draft).replace(self.path / name)
            except BaseException:
                Path(draft).unlink(missing_ok=True)
                raise
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)  # else a power cut could bring the old name back
            finally:
                os.close(folder)
        except OSError as e:
            raise ServerError(f"cannot write {self.path / name}: {e.strerror}") from e

    def _damaged(self, name: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self.path / name} is not what a coordinator wrote there; restore the folder from a backup, or begin "
            "the job anew in another folder (what it cost stays in every ledger)",
            field="state_dir",
            constraint="whole",
        )


def _moments(data: bytes, damaged: InvalidRequestError) -> Moments:
    found: dict[str, dict[str, np.ndarray[Any, np.dtype[np.float64]]]] = {"m": {}, "v": {}}
    try:
        tensors, _ = read_tensors(memoryview(data))
        for name, array in tensors.items():
            kind, _, rest = name.partition("/")
            found[kind][rest] = np.array(array, dtype=np.float64)
    except (FormatError, KeyError) as e:
        raise damaged from e
    return Moments(m=found["m"], v=found["v"])
