"""Pins: the newest checkpoint seen of each log, and which log answered where.

Like ssh's known_hosts: the first connection trusts what it finds, and every later one is held to it. A pin only
moves forward. Where the folder cannot be written, pins last as long as the process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Self

import rfc8785

from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.transparency.folder import Folder, data_folder
from tg_tinker.transparency.note import ORIGIN_PREFIX, Checkpoint, VerifierKey, origin_of

VERSION = 1
_DIGITS = 32
SERVERS = "known_servers.json"
_NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)  # of a damaged file


@dataclass(frozen=True)
class Pin:
    """A verified checkpoint, and when it was seen.

    Attributes:
        note: the signed note.
    """

    key: VerifierKey
    note: str
    seen: datetime

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What the note says, its signature checked."""
        return Checkpoint.open(self.note, self.key)

    def to_json(self) -> str:
        """The file's content: RFC 8785."""
        seen = self.seen.astimezone(UTC).isoformat(timespec="seconds")
        fields: dict[str, Any] = {
            "checkpoint": self.note,
            "seen": seen,
            "verifier_key": self.key.text,
            "version": VERSION,
        }
        return rfc8785.dumps(fields).decode() + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str) -> Self:
        """Read a file's content.

        Raises:
            ValueError: it is not a pin of the log ``origin``, signature included.
        """
        fields = _versioned(text)
        pin = cls(
            key=VerifierKey.parse(_text(fields, "verifier_key")),
            note=_text(fields, "checkpoint"),
            seen=_time(fields, "seen"),
        )
        if pin.checkpoint.origin != origin or origin_of(pin.key.public_key) != origin:
            raise ValueError("it is of another log")
        return pin


@dataclass(frozen=True, order=True)
class KnownServer:
    """Which log answered at an address, ``host:port``, for a tenant."""

    address: str
    tenant: str
    origin: str


class Pins:
    """Everything the client remembers of logs. Threads and processes may share the folder.

    A file that is damaged is an ``InvalidRequestError`` that names it and says how to go on, from every method.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._unwritten: dict[str, str | None] = {}  # what the folder would not take; None for deleted

    @classmethod
    def of_user(cls) -> Self:
        """Those in the user's data folder."""
        return cls(Folder(data_folder()))

    @property
    def all_written(self) -> bool:
        """Whether the folder took everything so far; otherwise some of it ends with the process."""
        return not self._unwritten

    def get(self, origin: str) -> Pin | None:
        """The pin of a log, if there is one."""
        text = self._read(_file(origin))
        try:
            return None if text is None else Pin.from_json(text, origin)
        except (*_NOT_OURS, LogVerificationError) as e:
            raise self._damaged(_file(origin), e, "the log could then have been rolled back unnoticed") from e

    def put(self, pin: Pin) -> None:
        """Remember a checkpoint that was verified, unless a newer one is remembered already.

        Raises:
            LogVerificationError: kind ``"forked"``: another process saw another root at the same size.
        """
        origin = pin.checkpoint.origin
        with self.folder.alone():
            before = self.get(origin)
            if before is not None and before.checkpoint.size == pin.checkpoint.size:
                if before.checkpoint.root != pin.checkpoint.root:
                    raise LogVerificationError(
                        f"the log {origin} was forked: at size {pin.checkpoint.size} its root is another than the "
                        f"one seen on {day(before.seen)} by another process",
                        kind="forked",
                        details={"origin": origin, "size": pin.checkpoint.size, "checkpoint": pin.note},
                    )
                return
            if before is None or before.checkpoint.size < pin.checkpoint.size:
                self._write(_file(origin), pin.to_json())

    def origins(self) -> list[str]:
        """Every log that has a pin, sorted."""
        unwritten = {name for name, text in self._unwritten.items() if text is not None}
        deleted = self._unwritten.keys() - unwritten
        names = {f"pins/{p.name}" for p in self.folder.files("pins", "*.json")} | unwritten
        digits = {n.removeprefix("pins/").removesuffix(".json") for n in names - deleted if n.endswith(".json")}
        return sorted(ORIGIN_PREFIX + d for d in digits if len(d) == _DIGITS)

    def servers(self) -> list[KnownServer]:
        """Every known server, sorted."""
        text = self._read(SERVERS)
        try:
            rows = [] if text is None else _versioned(text)["servers"]
            known = [KnownServer(_text(r, "address"), _text(r, "tenant"), _text(r, "origin")) for r in rows]
            for server in known:
                name_of(server.origin)
            return sorted(known)
        except (*_NOT_OURS, LogVerificationError) as e:
            raise self._damaged(SERVERS, e, "every server would then be trusted anew") from e

    def origin_at(self, address: str, tenant: str) -> str | None:
        """The log that answered there for this tenant."""
        return next((s.origin for s in self.servers() if (s.address, s.tenant) == (address, tenant)), None)

    def know(self, server: KnownServer) -> None:
        """Remember which log answers, instead of what was remembered for the address and tenant."""
        with self.folder.alone():
            before = self.servers()
            if server not in before:
                others = [s for s in before if (s.address, s.tenant) != (server.address, server.tenant)]
                self._write_servers([*others, server])

    def forget(self, address: str, tenant: str | None = None) -> list[KnownServer]:
        """Trust the next connection to the address as if it were the first; returns what was forgotten.

        The pins of the logs that answered there are put aside, beside the others, with ``.forgotten`` at the end of
        their names, since they are evidence.

        Args:
            tenant: this tenant's only.
        """
        with self.folder.alone():
            known = self.servers()
            gone = [s for s in known if s.address == address and tenant in (None, s.tenant)]
            if gone:
                self._write_servers([s for s in known if s not in gone])
            for origin in sorted({s.origin for s in gone}):
                self._put_aside(_file(origin))
        return gone

    def _write_servers(self, servers: list[KnownServer]) -> None:
        rows = [{"address": s.address, "tenant": s.tenant, "origin": s.origin} for s in sorted(servers)]
        self._write(SERVERS, rfc8785.dumps({"servers": rows, "version": VERSION}).decode() + "\n")

    def _read(self, name: str) -> str | None:
        if name in self._unwritten:
            return self._unwritten[name]
        try:
            return self.folder.read(name)
        except (OSError, UnicodeDecodeError) as e:
            raise self._damaged(name, e, "what it remembers would be lost") from e

    def _write(self, name: str, text: str) -> None:
        if self.folder.write(name, text):
            self._unwritten.pop(name, None)
        else:
            self._unwritten[name] = text

    def _put_aside(self, name: str) -> None:
        # Where the list of servers could not be written, nothing is forgotten for good and the pin stays there.
        if SERVERS not in self._unwritten and self.folder.rename(name, f"{name}.forgotten"):
            self._unwritten.pop(name, None)
        else:
            self._unwritten[name] = None

    def _damaged(self, name: str, reason: Exception, loss: str) -> InvalidRequestError:
        path = name if self.folder.path is None else self.folder.path / name
        return InvalidRequestError(
            f"{path} is damaged ({reason}). Put back a copy of it; or, if there is none and you trust the server as "
            f"it is, remove the file: {loss}",
            field="TG_TINKER_DATA_DIR",
            constraint="files as docs/formats/log.md describes them",
            details={"file": str(path)},
        )


def day(moment: datetime) -> str:
    """A time as messages show it: UTC, to the minute."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def name_of(origin: str) -> str:
    """The part of a log's name that its files are named after: 32 hexadecimal digits.

    Raises:
        LogVerificationError: kind ``"bad_signature"``: not the name of one of our logs.
    """
    digits = origin.removeprefix(ORIGIN_PREFIX)
    if digits == origin or len(digits) != _DIGITS or set(digits) - set("0123456789abcdef"):
        raise LogVerificationError(f"{origin[:100]!r} is not the name of a log", kind="bad_signature")
    return digits


def _file(origin: str) -> str:
    return f"pins/{name_of(origin)}.json"


def _versioned(text: str) -> Mapping[str, Any]:
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.get("version") != VERSION:
        raise ValueError(f"not an object of version {VERSION}")
    return fields


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is missing")
    return value


def _time(fields: Mapping[str, Any], name: str) -> datetime:
    moment = datetime.fromisoformat(_text(fields, name))
    if moment.tzinfo is None:
        raise ValueError(f"{name} has no time zone")
    return moment.astimezone(UTC)  # a year that UTC does not have is refused here
