"""A sampler that gives vLLM what it can answer exactly, and the rest to the built-in one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace

import torch

from tg_tinker.types.tokens import PromptFigures, SampleQuery
from tg_tinker_server.engine.lora import AdaptedBase
from tg_tinker_server.engine.sampling.seam import Progress, SampledWeights, Ticket, TokenSampler
from tg_tinker_server.engine.sampling.sequences import check_query
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights
from tg_tinker_server.engine.vllm.adapters import not_plain
from tg_tinker_server.engine.vllm.asking import why_not
from tg_tinker_server.engine.vllm.model import ModelWorker
from tg_tinker_server.engine.vllm.patience import SILENT_ON_CPU_S, SILENT_S, Patience
from tg_tinker_server.engine.vllm.process import WorkerProcess
from tg_tinker_server.engine.vllm.requests import Request
from tg_tinker_server.engine.vllm.settings import (
    MOST_POSITIONS_ON_CPU,
    WORKER,
    VllmConfig,
    engine_options,
    environment,
)
from tg_tinker_server.engine.vllm.telling import room_of

PATIENCE_S = 0.005
"""How long a step waits for a worker when there is nothing else to do: the compute thread is training's too."""
SourceOf = Callable[[AdaptedBase], str | None]


class RoutedSampler:
    """See ``seam.TokenSampler``. Who samples is decided before anything of a request is told.

    A request goes on with the weights it began with, also where the run is trained meanwhile: vLLM computes with a
    copy. The built-in sampler goes on with the new ones.

    Args:
        built_in: answers what vLLM does not.
        config, device: how, and where, engines run.
        source_of: folder or hub id of a base model that runs share; ``None`` for any other.
    """

    def __init__(self, built_in: TokenSampler, config: VllmConfig, device: str, source_of: SourceOf) -> None:
        self._built_in, self._config, self._device, self._source_of = built_in, config, device, source_of
        self._workers: dict[tuple[str, torch.dtype], ModelWorker] = {}
        self._owners: dict[Ticket, ModelWorker] = {}
        self._moved: dict[Ticket, Ticket] = {}  # tickets of the built-in sampler -> those that were given out
        self._arrived = threading.Event()

    @property
    def idle(self) -> bool:
        """See ``seam.TokenSampler``."""
        return self._built_in.idle and all(worker.idle for worker in self._workers.values())

    def submit(self, weights: SampledWeights, query: SampleQuery, *, group: Hashable) -> Ticket:
        """See ``seam.TokenSampler``."""
        check_query(weights, query)
        worker = None
        if isinstance(weights, TorchWeights) and self.why_built_in(weights, query) is None:
            worker = self._worker(weights)
        if worker is None or worker.unsupported:
            return self._built_in.submit(weights, query, group=group)
        assert isinstance(weights, TorchWeights)
        request = Request(weights, query, group)
        worker.submit(request)
        self._owners[request] = worker
        return request

    def why_built_in(self, weights: TorchWeights, query: SampleQuery) -> str | None:
        """Why the built-in sampler answers; ``None``: vLLM is asked."""
        if self._source_of(weights.base) is None:
            return "a copy of the model of its own, or a model from no folder"
        most = self._most_positions(weights.max_positions)
        if len(query.prompt) + room_of(weights, query) - 1 > most:
            return f"a text of more than {most} tokens"
        return not_plain(weights) or why_not(query, vocab_size=weights.vocab_size)

    def _most_positions(self, of_model: int) -> int:
        return min(of_model, MOST_POSITIONS_ON_CPU) if self._device == "cpu" else of_model

    def step(self, resting: Collection[SampledWeights] = ()) -> list[Progress]:
        """See ``seam.TokenSampler``. What vLLM does meanwhile it does by itself."""
        progress = self._visit(resting)
        if not self._built_in.idle:
            for report in self._built_in.step(resting):
                ticket = self._moved.get(report.ticket, report.ticket)
                progress.append(replace(report, ticket=ticket))
        elif not progress and self._arrived.wait(PATIENCE_S):
            progress = self._visit(resting)
        for report in progress:
            if report.error is not None or (report.events and isinstance(report.events[-1], PromptFigures)):
                self._forget(report.ticket)
        return progress

    def cancel(self, ticket: Ticket) -> None:
        """See ``seam.TokenSampler``."""
        owner = self._owners.pop(ticket, None)
        if owner is not None and isinstance(ticket, Request):
            owner.cancel(ticket)
            return
        self._built_in.cancel(self._forget(ticket))

    def close(self) -> None:
        """See ``seam.TokenSampler``."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._owners.clear()
        self._built_in.close()

    def _forget(self, ticket: Ticket) -> Ticket:
        """Keep nothing of a request; returns the built-in sampler's ticket, if it has one."""
        self._owners.pop(ticket, None)
        inner = next((inner for inner, outer in self._moved.items() if outer is ticket), ticket)
        self._moved.pop(inner, None)
        return inner

    def _visit(self, resting: Collection[SampledWeights]) -> list[Progress]:
        """What the workers said since the last time."""
        self._arrived.clear()
        progress: list[Progress] = []
        for worker in self._workers.values():
            reports, declined = worker.step(resting)
            progress += reports
            for request in declined:
                del self._owners[request]
                try:
                    inner = self._built_in.submit(request.weights, request.query, group=request.group)
                except Exception as e:  # noqa: BLE001 - told to whoever asked
                    progress.append(Progress(ticket=request, error=e))
                else:
                    self._moved[inner] = request
        return progress

    def _worker(self, weights: TorchWeights) -> ModelWorker:
        loaded = weights.base.loaded
        key = (loaded.name, loaded.dtype)
        if key not in self._workers:
            source = self._source_of(weights.base)
            assert source is not None
            options = engine_options(
                self._config,
                source=source,
                dtype=str(loaded.dtype).removeprefix("torch."),
                max_positions=self._most_positions(loaded.max_positions),
                device=self._device,
            )

            def start() -> WorkerProcess:
                return WorkerProcess(self._config.command(WORKER), environment(self._device), options, self._arrived)

            bare = TorchWeights(weights.base, None, size_bytes=0, on_close=lambda: None)
            patience = Patience(silent_s=SILENT_ON_CPU_S if self._device == "cpu" else SILENT_S)
            self._workers[key] = ModelWorker(loaded.name, bare, start, patience=patience)
        return self._workers[key]
