"""Folders named like hub ids, with tiny random models and openly made-up data, so that recipes need no network.

``datasets`` and ``transformers`` take a folder of the working directory before the hub. The vocabulary is small
enough that random answers are right now and then: one token in a hundred is the answer to every question, and one
ends the message, so that a policy can learn both from its rewards.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT, BASE, TEACHER = "Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-4B"
ANSWER = "7"
"""The answer to every made-up question; \\boxed{7} is one token."""
_POSITIONS = 2048
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WHOLE = ("<think>", "</think>", f"\\boxed{{{ANSWER}}}")
_COLOURS = ("red", "blue", "green", "black", "white", "amber")
THINGS = ("boats", "kites", "stones", "lamps", "drums", "maps")


def build(folder: Path, *, conversations: int = 160) -> dict[str, str]:
    """Make everything below ``folder``; return the server's table of models, name to folder."""
    tokenizer = _tokenizer()
    _model(folder / CHAT, tokenizer, seed=1)
    _model(folder / BASE, tokenizer, seed=2)
    _model(folder / TEACHER, tokenizer, seed=3, favours="abcdefghij")
    _rows(folder / "HuggingFaceH4/no_robots/train.jsonl", _conversations(conversations))
    _rows(folder / "HuggingFaceH4/no_robots/test.jsonl", _conversations(8))
    _rows(folder / "conversations.jsonl", _conversations(conversations))
    _rows(folder / "Anthropic/hh-rlhf/train.jsonl", _comparisons(64))
    _rows(folder / "Anthropic/hh-rlhf/test.jsonl", _comparisons(8))
    _rows(folder / "zwhe99/DeepMath-103K/train.jsonl", ({"question": q} for q in _questions(64)))
    sums = folder / "openai/gsm8k"
    for split, count in (("train", 64), ("test", 4)):
        answered = ({"question": q, "answer": f"It is made up.\n#### {ANSWER}"} for q in _questions(count))
        _rows(sums / "main" / f"{split}.jsonl", answered)
    files = [{"split": s, "path": f"main/{s}.jsonl"} for s in ("train", "test")]
    front = {"configs": [{"config_name": "main", "data_files": files}]}
    (sums / "README.md").write_text(f"---\n{json.dumps(front)}\n---\nMade up for tests.\n")
    return {name: str(folder / name) for name in (CHAT, BASE, TEACHER)}


def _tokenizer() -> PreTrainedTokenizerFast:
    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    vocabulary = {c: i for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(_CONTROL))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _WHOLE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int, favours: str = "") -> None:
    """Near uniform after every text, but for ``favours``: e^3 times as likely as the others."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = Qwen3ForCausalLM(config)
    with torch.no_grad():  # one direction that every text has in common, which a preference can lean on
        model.model.embed_tokens.weight += 0.5
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list(favours))] += 3.0 / config.hidden_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _questions(count: int) -> list[str]:
    return [f"Made-up sum {i}: how many {THINGS[i % 6]}?" for i in range(count)]


def _conversations(count: int) -> Iterable[Mapping[str, Any]]:
    for i in range(count):
        colour, thing = _COLOURS[i % 6], THINGS[i // 6 % 6]
        yield {
            "messages": [
                {"role": "user", "content": f"Record {i}, made up: colour of the {thing}?"},
                {"role": "assistant", "content": f"The {thing} are {colour}."},
            ]
        }


def _comparisons(count: int) -> Iterable[Mapping[str, Any]]:
    for i in range(count):
        asked = f"\n\nHuman: Made-up question {i} about {THINGS[i % 6]}?\n\nAssistant: "
        yield {"chosen": asked + "Yes, gladly.", "rejected": asked + "no no no no"}


def _rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
