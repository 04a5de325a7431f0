"""A federation in memory for the tests of masking: a job, sites, one coordinator, and steps that may go wrong.

Shape suffixes: P parameters.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from secrets import token_bytes
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.federated.job import Job, Masking
from tg_tinker.federated.masking import MaskedMean, MaskingRound, MaskingSite
from tg_tinker.federated.masking.setting import Place

Vector = npt.NDArray[np.float32]
STEPS = ("keys", "shares", "train", "agree", "open")


def identity(name: str) -> Ed25519PrivateKey:
    """The same key for the same name in every run."""
    return Ed25519PrivateKey.from_private_bytes(sha256(b"identity of " + name.encode()).digest())


def public(name: str) -> str:
    """Its public half as the roster has it."""
    return base64.b64encode(identity(name).public_key().public_bytes_raw()).decode()


def names(count: int) -> list[str]:
    """Names of sites; their order is not that of their numbers."""
    return [f"site-{i}" for i in range(1, count + 1)]


def dice(name: str) -> Callable[[int], bytes]:
    """Fixed secrets for one site, another one each time."""
    count = itertools.count()
    return lambda size: sha256(f"{name} draws {next(count)}".encode()).digest()[:size]


def make_job(sites: list[str], *, rounds: int = 10, **masking: Any) -> Job:
    """A job under masks among these sites."""
    return Job(
        job_id="icd10",
        base_model="tiny",
        rounds=rounds,
        batch_size=8,
        roster={name: public(name) for name in sites},
        coordinator=public("coordinator"),
        expires=datetime(2030, 1, 31, tzinfo=UTC),
        adapter_digest="ab" * 32,
        masking=Masking(**masking),
    )


def base_of(round_: int) -> str:
    """Digest of the weights that a round begins with; each with its own."""
    return sha256(b"weights of round %d" % round_).hexdigest()


def plain_mean(updates: Mapping[str, Vector], *, clip: float) -> npt.NDArray[np.float64]:
    """The mean of the clipped updates, without ring or masks."""
    return np.mean([np.clip(u.astype(np.float64), -clip, clip) for u in updates.values()], axis=0)


def forge(
    federation: Federation, site: str, *, round_: int = 1, attempt: int = 0, base: str = "", **keys: bytes
) -> Any:
    """Keys of the forger's choice under the true signature of ``site``: what a site in league can show."""
    place = Place(federation.job.digest(), round_, attempt)
    shown = {"base": base or base_of(round_)}
    shown |= {name: base64.b64encode(value).decode() for name, value in keys.items()}
    signature = identity(site).sign(place.bind("tg-tinker/masking/keys/v1", site=site, **shown))
    return {**shown, "signature": base64.b64encode(signature).decode()}


@dataclass
class Federation:
    """Sites and what the coordinator saw of them.

    Attributes:
        seen: every message that passed the coordinator: step, site, request, reply.
        states: of each site, in the order of its replies; what a thief or a site in league with others has.
        bases: digest of the weights that a round begins with, where it is not `base_of`.
        restart: put every site away as JSON and bring it back before each step.
    """

    job: Job
    restart: bool = False
    seen: list[tuple[str, str, Any, Any]] = field(default_factory=list)
    states: dict[str, list[Any]] = field(default_factory=dict)
    sites: dict[str, MaskingSite] = field(default_factory=dict)
    bases: dict[int, str] = field(default_factory=dict)

    def base(self, round_: int) -> str:
        """Digest of the weights that a round begins with."""
        return self.bases.get(round_, base_of(round_))

    @classmethod
    def of(cls, count: int, *, restart: bool = False, fixed: bool = False, **masking: Any) -> Federation:
        """``count`` honest sites; ``fixed``: the same secrets in every run."""
        job = make_job(names(count), **masking)
        made = cls(job=job, restart=restart)
        made.sites = {
            name: MaskingSite(job, name, identity(name), entropy=dice(name) if fixed else token_bytes)
            for name in job.roster
        }
        return made

    def updates(self, size: int = 40, *, seed: int = 0, scale: float = 0.1) -> dict[str, Vector]:
        """An update for each site; a few coordinates lie outside of the clipping range."""
        random = np.random.default_rng(seed)
        return {name: (random.normal(size=size) * scale).astype(np.float32) for name in self.sites}

    def call(
        self, step: str, site: str, round_: int, attempt: int, request: Any, update_P: Vector | None = None
    ) -> Any:
        """One request to one site."""
        if self.restart:
            self.sites[site] = MaskingSite(
                self.job, site, identity(site), state=json.loads(json.dumps(self.sites[site].state))
            )
        if step == "train":
            assert update_P is not None
            self.sites[site].receive(round_, attempt, request, base=self.base(round_))
            reply: Any = self.sites[site].mask(round_, attempt, update_P)
        else:
            reply = json.loads(json.dumps(self.sites[site].answer(f"mask.{step}", round_, attempt, request)))
        self.seen.append((step, site, request, reply))
        self.states.setdefault(site, []).append(self.sites[site].state)
        return reply

    def run(
        self,
        updates: Mapping[str, Vector],
        *,
        round_: int = 1,
        attempt: int = 0,
        silent: Mapping[str, set[str]] | None = None,
        alter: Callable[[str, str, Any], Any] | None = None,
        until: str = "open",
    ) -> tuple[MaskingRound, MaskedMean | Any]:
        """A round.

        Args:
            silent: sites whose reply is lost, by the step from which on they are gone.
            alter: what becomes of a reply before the coordinator reads it: (step, site, reply) -> reply.
            until: the last step that is asked for.

        Returns:
            The coordinator's round and its mean, or what it would ask next.
        """
        size = len(next(iter(updates.values())))
        round_state = MaskingRound(self.job, round_, attempt, size=size, base=self.base(round_))
        gone: set[str] = set()
        ask: dict[str, Any] = dict.fromkeys(updates, round_state.begin())
        after: Any = None
        for step in STEPS:
            gone |= (silent or {}).get(step, set())
            replies = {}
            for site, request in ask.items():
                if site not in gone:
                    reply = self.call(step, site, round_, attempt, request, updates[site])
                    replies[site] = alter(step, site, reply) if alter else reply
            match step:
                case "keys":
                    after = round_state.keys(replies)
                    ask = dict.fromkeys(after["keys"], after)
                case "shares":
                    after = ask = round_state.shares(replies)
                case "train":
                    after = round_state.masked(replies)
                    ask = dict.fromkeys(after["stayed"], after)
                case "agree":
                    after = round_state.agreed(replies)
                    ask = dict.fromkeys(after["signatures"], after)
                case "open":
                    after = round_state.opened(replies)
            if step == until:
                break
        return round_state, after
