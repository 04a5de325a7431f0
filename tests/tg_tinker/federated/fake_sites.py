"""Sites that answer by the book and train nothing: each pulls the model towards a place of its own.

Their updates are known in closed form, so that a test can say what the next model must be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tg_tinker.federated.jobs import key_of
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import public_key
from tg_tinker.federated.masking import ARRAY, KINDS, MaskingSite
from tg_tinker.federated.messages import Envelope
from tg_tinker.federated.statement import SiteStatement, sign_statement
from tg_tinker.federated.updates import flatten, trained_names, weights_digest

Update = Callable[[Mapping[str, npt.NDArray[Any]], int], Mapping[str, npt.NDArray[np.float32]]]


def pull_of(site: str, weights: Mapping[str, npt.NDArray[Any]], round_: int) -> dict[str, npt.NDArray[np.float32]]:
    """A step of a tenth towards the site's place, a little to the side in each round."""
    found = {}
    for name, value in weights.items():
        seed = int.from_bytes(hashlib.sha256(f"{site}/{name}/{round_}".encode()).digest()[:8], "big")
        place = np.random.default_rng(seed).normal(size=value.shape)
        found[name] = (0.1 * (place - value)).astype(np.float32)
    return found


class FakeSite:
    """See ``Site``.

    Attributes:
        trained: how often each round was really trained; more than once is a second charge.
        refuses: reason by kind of request.
        plain: the updates, by round.
        update: replaces ``pull_of``, to send poison.
    """

    def __init__(self, name: str, *, update: Update | None = None) -> None:
        self.name, self.key = name, key_of(name)
        self.update = update or (lambda weights, round_: pull_of(name, weights, round_))
        self.refuses: dict[str, str] = {}
        self.trained: dict[int, int] = {}
        self.plain: dict[int, Mapping[str, npt.NDArray[np.float32]]] = {}
        self.job: Job | None = None
        self._stored: dict[int, tuple[str, Mapping[str, npt.NDArray[np.float32]]]] = {}
        self._masking: dict[str, Any] | None = None

    def handle(self, request: Envelope) -> Envelope:
        try:
            request.verify(public_key(self._job_of(request).coordinator))
            if request.kind in self.refuses:
                raise FederationRefusedError("not here", reason=self.refuses[request.kind])
            facts, arrays = self._answer(request)
        except FederationRefusedError as e:
            facts, arrays = {"refused": e.reason, "message": e.message}, {}
        return request.reply(facts=facts, arrays=arrays).signed(self.key)

    def _job_of(self, request: Envelope) -> Job:
        if request.kind == "join":
            self.job = Job.model_validate(request.facts["job"])
        assert self.job is not None
        assert self.job.digest() == request.job
        return self.job

    def _answer(self, request: Envelope) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        job = self._job_of(request)
        if request.kind == "join":
            return {"accepted": True}, {}
        if request.kind == "finish":
            return {"statement": sign_statement(self.statement(job), self.key)}, {}
        masking = MaskingSite(job, self.name, self.key, state=self._masking) if job.masking else None
        if masking is not None and request.kind in KINDS:
            facts = masking.answer(request.kind, request.round, request.attempt, request.facts)
            self._masking = masking.state
            return facts, {}
        assert request.kind == "train"
        if masking is not None:
            masking.receive(request.round, request.attempt, request.facts, base=weights_digest(request.arrays))
        update = self._train(job, request)
        if masking is None:
            return {}, update
        masked_P = masking.mask(request.round, request.attempt, flatten(update))
        self._masking = masking.state
        return {}, {ARRAY: masked_P}

    def _train(self, job: Job, request: Envelope) -> Mapping[str, npt.NDArray[np.float32]]:
        digest = weights_digest(request.arrays)
        assert request.round > 1 or digest == job.adapter_digest
        if request.round not in self._stored:
            names = trained_names(request.arrays, job.frozen_factor(request.round))
            update = self.update({n: request.arrays[n] for n in names}, request.round)
            self._stored[request.round] = digest, update
            self.trained[request.round] = self.trained.get(request.round, 0) + 1
        self.plain[request.round] = self._stored[request.round][1]
        known, update = self._stored[request.round]
        if known != digest:
            raise FederationRefusedError("other global arrays", reason="wrong_round")
        return update

    def statement(self, job: Job) -> SiteStatement:
        return SiteStatement(
            job=job.digest(),
            site=self.name,
            time="2026-01-01T00:00:00+00:00",
            rounds=tuple(sorted(self.trained)),
            unit="datum",
            epsilon="1.0",
            delta="1e-05",
            target_epsilon="8.0",
            dataset_epsilon="1.0",
            dataset_delta="1e-05",
            dataset_target_epsilon="8.0",
            public_units=16,
            log_origin="x",
            log_checkpoint="x",
            report_sha256="0" * 64,
        )
