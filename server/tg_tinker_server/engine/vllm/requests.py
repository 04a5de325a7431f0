"""Requests that a worker has, or waits for."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tg_tinker.errors import ServerError
from tg_tinker.types.tokens import SampleEvent, SampleQuery
from tg_tinker_server.engine.sampling.seam import Progress, Ticket
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights
from tg_tinker_server.engine.vllm.adapters import Held, adapts_output
from tg_tinker_server.engine.vllm.process import Message
from tg_tinker_server.engine.vllm.telling import Row, SequenceTelling, prompt_figures


class Request(Ticket):
    """One request.

    Attributes:
        sequences: those that have no end yet, by their index.
        held: the adapter that it has in the worker.
        kind: "scores": it asks for log-probabilities of its prompt; "output": its adapter changes the output layer.
    """

    __slots__ = ("_hits", "_rows", "group", "held", "kind", "query", "sequences", "weights")

    def __init__(self, weights: TorchWeights, query: SampleQuery, group: Hashable) -> None:
        self.weights, self.query, self.group = weights, query, group
        self.sequences = {index: SequenceTelling(weights, query, index) for index in range(query.num_samples)}
        self.held: Held | None = None
        self.kind = "output" if adapts_output(weights) else "scores" if _scores(query) else ""
        self._hits = 0
        self._rows: Sequence[Row | None] | None = None

    def may_run_with(self, other: Request) -> bool:
        """Whether vLLM may compute both together. It applies adapters of the output layer, row by row, to whatever it
        computes log-probabilities of, and takes positions of a prompt for rows of the batch.
        """
        return self.group == other.group and {self.kind, other.kind} != {"output", "scores"}

    def heard(self, index: int, message: Message) -> Progress:
        """What the worker said of one sequence. With the last one's end come the figures of the prompt.

        Raises:
            TGTinkerError: the request has failed.
        """
        if "error" in message:
            raise ServerError(f"the vLLM engine refused the request ({message['error']})")
        sequence = self.sequences[index]
        if index == 0:
            self._hits = max(self._hits, int(message["hits"]))
            self._rows = message.get("prompt", self._rows)
        events: list[SampleEvent] = list(
            sequence.tell(message["tokens"], message["logprobs"], ended=bool(message["ended"]))
        )
        if sequence.ended:
            del self.sequences[index]
            if not self.sequences:
                events.append(prompt_figures(self.query, self._rows, hits=self._hits))
        return Progress(ticket=self, events=tuple(events))


def _scores(query: SampleQuery) -> bool:
    return query.prompt_logprobs or query.topk_prompt_logprobs > 0
