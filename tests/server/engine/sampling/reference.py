"""A second way to choose the next token: whole sorts in float64, as the options are defined."""

from __future__ import annotations

import numpy as np


def penalised(logits_V, options, *, prompt=(), generated=()):
    out = np.array(logits_V, dtype=np.float64)
    for token in {*prompt, *generated}:
        rate = options.repetition_penalty
        out[token] = out[token] / rate if out[token] > 0 else out[token] * rate
    for token in set(generated):
        out[token] -= options.presence_penalty + options.frequency_penalty * list(generated).count(token)
    return out


def choose(logits_V, options, point, *, prompt=(), generated=()):
    """The token at this point, 0 to 1, of the distribution."""
    logits = penalised(logits_V, options, prompt=prompt, generated=generated)
    if options.temperature == 0:
        return int(np.argmax(logits))
    logits = (logits - logits.max()) / options.temperature
    order = np.argsort(-logits, kind="stable")
    if options.top_k:
        logits[order[options.top_k :]] = -np.inf
    if options.top_p < 1:
        shares = softmax(logits)[order]
        logits[order[np.cumsum(shares) - shares >= options.top_p]] = -np.inf
    cumulative = np.cumsum(softmax(logits))
    total = cumulative[-1]
    return int(np.searchsorted(cumulative, min(point * total, np.nextafter(total, 0)), side="right"))


def softmax(logits_V):
    exp_V = np.exp(logits_V - logits_V.max())
    return exp_V / exp_V.sum()
