"""The ids of the protocol. All are made of positions, so a restarted server understands those it gave out before.

<session>                                  32 hex digits
<session>:train:<n>                        a model: the run whose request_id is "tinker/" and this
<session>:sample:<n>                       a sampler
<model>:create, <model>:load               the request that makes a model, of saved weights or of none
<model>:op:<seq>[:sampler:<n>:<seal>]      one training operation, and the sampler to make of what it saves; the seal
                                           shows that the operation's own request asked for that sampler
<sampler>:req:<seq>                        one sample
<session>:loss:<n>:<loss>                  a custom loss, with its id
refused:<hex>                              a request that could be read and was refused
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Literal

from tg_tinker.errors import ResourceNotFoundError

RUN_PREFIX = "tinker/"
_NUMBER = "[0-9]{1,19}"
_MODEL = f"(?P<session>[0-9a-f]{{32}}):train:(?P<n>{_NUMBER})"
_SAMPLER = f"(?P<session>[0-9a-f]{{32}}):sample:(?P<n>{_NUMBER})"
_PATTERNS: dict[str, re.Pattern[str]] = {
    "create": re.compile(f"(?P<owner>{_MODEL}):create"),
    "load": re.compile(f"(?P<owner>{_MODEL}):load"),
    "operation": re.compile(
        f"(?P<owner>{_MODEL}):op:(?P<seq>{_NUMBER})(:sampler:(?P<sampler>{_NUMBER}):(?P<seal>[0-9a-f]{{24}}))?"
    ),
    "sample": re.compile(f"(?P<owner>{_SAMPLER}):req:(?P<seq>{_NUMBER})"),
    "loss": re.compile(f"(?P<owner>[0-9a-f]{{32}}):loss:(?P<seq>{_NUMBER}):(?P<loss>loss_[0-9a-f]{{1,64}})"),
    "refused": re.compile("(?P<owner>refused):(?P<seq>[0-9a-f]{32})"),
}
Kind = Literal["create", "load", "operation", "sample", "loss", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestName:
    """A request id taken apart.

    Attributes:
        owner: the model, the sampler or the session that the request belongs to.
        seq: its number there; 0 of a creation.
        sampler: full id of the sampler that is made of what the operation saves; empty: none.
        seal: what the server gave that out with.
        loss: id of the custom loss that was made.
    """

    kind: Kind
    owner: str
    seq: int
    sampler: str = ""
    seal: str = ""
    loss: str = ""


def new_session() -> str:
    """An unguessable session id; every other id begins with one."""
    return secrets.token_hex(16)


def new_refusal() -> str:
    """The id of a request that was refused."""
    return f"refused:{secrets.token_hex(16)}"


def model_id(session: str, n: int) -> str:
    """The id of a session's n-th model."""
    return f"{session}:train:{n}"


def sampler_id(session: str, n: int) -> str:
    """The id of a session's n-th sampler."""
    return f"{session}:sample:{n}"


def create_request(model: str) -> str:
    """The request that makes a model."""
    return f"{model}:create"


def load_request(model: str) -> str:
    """The request that makes a model of saved weights."""
    return f"{model}:load"


def operation_request(model: str, seq: int, sampler: int | None = None, seal: str = "") -> str:
    """The request at a position of a model."""
    return f"{model}:op:{seq}" + ("" if sampler is None else f":sampler:{sampler}:{seal}")


def sample_request(sampler: str, seq: int) -> str:
    """The request at a position of a sampler."""
    return f"{sampler}:req:{seq}"


def loss_request(session: str, n: int, loss: str) -> str:
    """The request that makes a custom loss."""
    return f"{session}:loss:{n}:{loss}"


def session_of(text: str) -> str:
    """The session of a model or a sampler; empty where the id is neither."""
    found = re.fullmatch(f"{_MODEL}", text) or re.fullmatch(f"{_SAMPLER}", text)
    return found["session"] if found else ""


def sampler_of(model: str, n: int) -> str:
    """The id of the n-th sampler of a model's session."""
    return sampler_id(session_of(model), n)


def is_model(text: str) -> bool:
    """Whether this can be a model's id."""
    return re.fullmatch(_MODEL, text) is not None


def parse_request(text: str) -> RequestName:
    """What a request id stands for.

    Raises:
        ResourceNotFoundError: nothing that this server gives out.
    """
    for kind, pattern in _PATTERNS.items():
        found = pattern.fullmatch(text)
        if found is None:
            continue
        parts = found.groupdict()
        sampler = sampler_id(parts["session"], int(parts["sampler"])) if parts.get("sampler") else ""
        seq = int(parts.get("seq") or 0) if kind != "refused" else 0
        return RequestName(
            kind=kind,  # type: ignore[arg-type]
            owner=parts["owner"],
            seq=seq,
            sampler=sampler,
            seal=parts.get("seal") or "",
            loss=parts.get("loss") or "",
        )
    raise not_found("request", text)


def not_found(what: str, which: str) -> ResourceNotFoundError:
    """The one answer for what is missing and for what is another tenant's."""
    return ResourceNotFoundError(f"no such {what}", resource_type=what, resource_id=which[:200])
