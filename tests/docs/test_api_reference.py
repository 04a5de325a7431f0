"""The API reference, taken at its word: examples run unmodified, signatures and results are as printed."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tg_tinker
from tests.docs.snippets import Snippet, snippets
from tg_tinker import TrainingClient, types

REFERENCE = Path(__file__).with_name("training-client-api.md")


def kind(snippet: Snippet) -> str:
    """What a block of the reference is: an example, a result type, or a signature without a body."""
    if snippet.code.startswith("@dataclass"):
        return "result"
    return "signature" if snippet.code.startswith(("def ", "@property")) else "example"


def blocks(which: str) -> list[Snippet]:
    return [s for s in snippets(REFERENCE) if kind(s) == which]


def test_the_reference_has_the_blocks_we_know() -> None:
    assert [len(blocks(k)) for k in ("example", "signature", "result")] == [10, 12, 7]


@pytest.mark.usefixtures("documented_server")
def test_every_example_runs_unmodified_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    batch: dict[str, Any] = {
        "input_ids": np.array([[5, 6, 7, 8], [9, 10, 11, 12]]),
        "attention_mask": np.ones((2, 4), dtype=np.int64),
        "labels": np.array([[5, 6, 7, 8], [9, 10, -100, -100]]),
    }
    given: dict[str, Any] = {**batch, "train_loader": [batch, batch], "val_loader": [batch], "val_losses": []}
    namespace = dict(given)
    for example in blocks("example"):
        example.execute(namespace)
    printed = capsys.readouterr().out
    for text in (
        "Loss: ",
        "Gradient hash: sha256:",
        "Learning rate: 0.0001",
        "Encryption: AES-256-GCM",
        "Loaded step: 3",
    ):
        assert text in printed
    assert "API error" not in printed
    assert "Invalid batch" not in printed
    assert len(namespace["val_losses"]) == 1


@pytest.mark.parametrize("snippet", blocks("signature"), ids=lambda s: s.code.split("def ")[1].split("(")[0])
def test_signatures_are_as_printed(snippet: Snippet) -> None:
    (printed,) = ast.parse(snippet.code.rstrip() + ": ...").body
    assert isinstance(printed, ast.FunctionDef)
    attribute = inspect.getattr_static(TrainingClient, printed.name)
    if printed.decorator_list:
        assert isinstance(attribute, property)
        return
    signature = inspect.signature(attribute)
    names = [a.arg for a in printed.args.args]
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional][: len(names)] == names
    defaults = [ast.literal_eval(d) for d in printed.args.defaults]
    with_defaults = positional[len(names) - len(defaults) : len(names)] if defaults else []
    assert [p.default for p in with_defaults] == defaults


@pytest.mark.parametrize("snippet", blocks("result"), ids=lambda s: s.code.split("class ")[1].split(":")[0])
def test_results_have_the_printed_fields_in_order(snippet: Snippet) -> None:
    (printed,) = ast.parse(snippet.code).body
    assert isinstance(printed, ast.ClassDef)
    ours = getattr(types, printed.name)
    names = [s.target.id for s in printed.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    assert [f.name for f in dataclasses.fields(ours)] == names
    assert hasattr(tg_tinker, printed.name)
