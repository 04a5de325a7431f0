"""Requests that a worker has, or waits for."""

from __future__ import annotations

from collections.abc import Hashable

from tg_tinker.errors import ServerError
from tg_tinker.types.tokens import PromptFigures, SampleEvent, SampleQuery
from tg_tinker_server.engine.sampling.seam import Progress, Ticket
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights
from tg_tinker_server.engine.vllm.adapters import Held
from tg_tinker_server.engine.vllm.process import Message
from tg_tinker_server.engine.vllm.telling import SequenceTelling


class Request(Ticket):
    """One request.

    Attributes:
        sequences: those that have no end yet, by their index.
        held: the adapter that it has in the worker.
    """

    __slots__ = ("_hits", "group", "held", "query", "sequences", "weights")

    def __init__(self, weights: TorchWeights, query: SampleQuery, group: Hashable) -> None:
        self.weights, self.query, self.group = weights, query, group
        self.sequences = {index: SequenceTelling(weights, query, index) for index in range(query.num_samples)}
        self.held: Held | None = None
        self._hits = 0

    def heard(self, index: int, message: Message) -> Progress:
        """What the worker said of one sequence. With the last one's end comes the last event.

        Raises:
            TGTinkerError: the request has failed.
        """
        if "error" in message:
            raise ServerError(f"the vLLM engine refused the request ({message['error']})")
        sequence = self.sequences[index]
        if index == 0:
            self._hits = max(self._hits, int(message["hits"]))
        events: list[SampleEvent] = list(
            sequence.tell(message["tokens"], message["logprobs"], ended=bool(message["ended"]))
        )
        if sequence.ended:
            del self.sequences[index]
            if not self.sequences:
                events.append(PromptFigures(prompt_cache_hit_tokens=self._hits))
        return Progress(ticket=self, events=tuple(events))
