"""How to generate text: the options of ``sample``, checked once for both sides."""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError

_INF = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to generate. Applied in this order: penalties, temperature, top_k, top_p.

    Attributes:
        max_tokens: most tokens of one completion; at least 1.
        temperature: 0 is greedy.
        top_p: smallest set of tokens with at least this probability; 1 keeps all.
        top_k: most likely tokens to keep; ``None`` or 0 keeps all.
        stop_sequences: texts that end a completion; they are not part of it.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
        presence_penalty: taken off the logit of every token already generated.
        frequency_penalty: the same, times how often it was generated.
        seed: of the random choices; ``None`` takes a fresh one. Each completion draws from a stream of its own, named
            by the seed and its place among the completions of the request, whatever the other prompts are. Equal
            requests to equal weights get equal text, unless two tokens are so nearly as likely that float rounding
            decides, which depends on what the server computes beside them. Other versions of the server may choose
            otherwise.

    Raises:
        InvalidRequestError: naming the option that is out of range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_sequences: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", 1 <= self.max_tokens < 2**63, ">= 1"),
            ("temperature", 0 <= self.temperature < _INF, ">= 0 and finite"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("top_k", self.top_k is None or 0 <= self.top_k < 2**63, ">= 1, or None for all"),
            ("stop_sequences", all(self.stop_sequences), "no empty stop sequence"),
            ("stop_sequences", len(self.stop_sequences) <= 64, "at most 64 stop sequences"),
            ("stop_sequences", sum(map(len, self.stop_sequences)) <= 10_000, "at most 10,000 characters together"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("presence_penalty", abs(self.presence_penalty) < _INF, "finite"),
            ("frequency_penalty", abs(self.frequency_penalty) < _INF, "finite"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
        )
        for name, holds, constraint in rules:
            if not holds:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} is not possible; it must be {constraint}",
                    field=name,
                    constraint=constraint,
                )
