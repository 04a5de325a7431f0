"""Batches of sequences, and what one slice did for the requests in it."""

from __future__ import annotations

from collections.abc import Iterable

from tg_tinker_server.engine.sampling.rows import Memory, RunningRows
from tg_tinker_server.engine.sampling.seam import Progress, SampledWeights
from tg_tinker_server.engine.sampling.sequences import Request, Sampling


class Batch:
    """Sequences that go through the model together."""

    def __init__(self, rows: RunningRows) -> None:
        self.rows = rows
        self.sequences: list[Sampling] = []

    def arrange(self, sequences: Iterable[Sampling]) -> None:
        """Hold these sequences, those of equal weights next to each other. Whoever joins brings its memory."""
        order = sorted(sequences, key=lambda s: id(s.request.weights))
        places = {id(s): at for at, s in enumerate(self.sequences)}
        if [places.get(id(s)) for s in order] == list(range(len(self.sequences))):
            return
        wanted: list[int | tuple[SampledWeights, Memory]] = []
        for sequence in order:
            at = places.get(id(sequence))
            if at is None:
                assert sequence.memory is not None
                wanted.append((sequence.request.weights, sequence.memory))
                sequence.memory, sequence.since = None, 0
            else:
                wanted.append(at)
        self.rows.arrange(wanted)
        self.sequences = order


def requests_of(sequences: Iterable[Sampling]) -> list[Request]:
    """Whose they are, each once."""
    return list({id(s.request): s.request for s in sequences}.values())


def joined(progress: list[Progress]) -> list[Progress]:
    """One report for each request, its events in their order."""
    events: dict[int, Progress] = {}
    for report in progress:
        before = events.get(id(report.ticket))
        events[id(report.ticket)] = (
            report
            if before is None
            else Progress(
                ticket=report.ticket, events=(*before.events, *report.events), error=before.error or report.error
            )
        )
    return list(events.values())
