"""Requests for text in a sampler, and weights that make them certain."""

import numpy as np

from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import PromptFigures
from tg_tinker_server.engine.bigram import BigramSession
from tg_tinker_server.engine.sampling.bigram_rows import BigramRows
from tg_tinker_server.engine.sampling.text_query import SampledText, text_queries
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler
from tg_tinker_server.engine.sampling.torch_rows import TorchRows
from tg_tinker_server.engine.tokenizers import ByteTokenizer

PROMPTS = [[5, 6, 7], list(b"a longer prompt"), [200]]


class Texts:
    """Requests for text in a sampler of their own, or a given one."""

    def __init__(self, session, sampler=None):
        self.weights = session.live_weights() if hasattr(session, "live_weights") else session
        rows = BigramRows() if isinstance(session, BigramSession | Certain) else TorchRows()
        self.sampler = sampler or BatchedSampler(rows, most_rows=64, prefix_bytes=2**24)
        self.events, self.hits = [], []

    def ask(self, prompts, *, completions=1, group="all", **options):
        queries = text_queries(self.weights, prompts, GenerationOptions(**options), completions=completions)
        return [self.sampler.submit(self.weights, q, group=group) for q in queries]

    def step(self, resting=()):
        """One slice; its events of text, which are kept too."""
        news = []
        for progress in self.sampler.step(resting):
            if progress.error is not None:
                raise progress.error
            news += [e for e in progress.events if isinstance(e, SampledText)]
            self.hits += [e.prompt_cache_hit_tokens for e in progress.events if isinstance(e, PromptFigures)]
        self.events += news
        return news

    def results(self):
        """Tokens, text and finish reason of each completion."""
        while not self.sampler.idle:
            self.step()
        events, self.events = self.events, []
        out = [[(), "", None] for _ in {e.index for e in events}]
        for event in events:
            assert out[event.index][2] is None, "an event after the end"
            out[event.index][0] += event.tokens
            out[event.index][1] += event.text
            out[event.index][2] = event.finish_reason
        return [tuple(o) for o in out]


def collect(session, prompts, *, sampler=None, **options):
    texts = Texts(session, sampler)
    texts.ask(prompts, **options)
    return texts.results()


class Certain:
    """Weights with which the token before makes the next one certain."""

    vocab_size, max_positions, eos_token_ids, start_token_id, closed, version = 260, 4096, (257,), 256, False, 0

    def __init__(self, text, eos=257):
        """After each byte of the text comes the next, after the last the end."""
        self.tokens = [*text.encode(), eos]

    def logits(self, tokens):
        out = np.zeros((len(tokens), 260))
        for row, token in zip(out, tokens, strict=True):
            at = self.tokens.index(token) + 1 if token in self.tokens[:-1] else 0
            row[self.tokens[at]] = 100.0
        return out

    def decode(self, ids):
        return ByteTokenizer().decode(ids)

    def when_closed(self, tell):
        pass
