"""Findings made up for tests: the shape of a real demo, none of its cost."""

from __future__ import annotations

from tg_tinker_server.demo.ledger_file import LedgerFacts
from tg_tinker_server.demo.report import Findings
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import Checkpoint, Measured, StepPoint

CHECKPOINT = Checkpoint(
    artifact_id="ckpt_0123456789abcdef",
    size_bytes=2_654_321,
    algorithm="AES-256-GCM",
    key_id="tenant-kek/demo/v1",
    content_hash="sha256:" + "ab12" * 16,
    saved="2026-01-02T03:04:05+00:00",
)
LEDGER = LedgerFacts(
    entries=181,
    charges=90,
    head="9f" * 32,
    epsilon=7.9991,
    pld_epsilon=7.41,
    target_epsilon=8.0,
    delta=2e-5,
    noise_multiplier=0.4112,
    sample_rate=0.0028,
    vouched_by="client",
    accountant="rdp",
    file=".tg-tinker/demo/ledger.jsonl",
)


def step_point(step: int) -> StepPoint:
    """A step whose loss falls and whose epsilon rises."""
    return StepPoint(step=step, loss=4.0 + 2.0 / step, epsilon=5.0 + 3.0 * step / 90, tokens=2800, seconds=0.5)


def findings(**changes: object) -> Findings:
    """Findings of a finished demo, with ``changes``."""
    values: dict[str, object] = {
        "settings": DemoSettings(),
        "source": "wordings of a classification",
        "dataset_size": 45_593,
        "trainable_parameters": 221_184,
        "before": Measured(perplexity=400.4, samples=("the whale", "a man", "the ship", "she")),
        "after": Measured(perplexity=66.1, samples=("left humerus", "upper lobe", "other drugs", "injury")),
        "history": tuple(step_point(step) for step in range(1, 91)),
        "checkpoint": CHECKPOINT,
        "reopened_perplexity": 66.1,
        "ciphertext_matches": True,
        "ledger": LEDGER,
        "made": "2026-01-02 03:04 UTC",
    }
    return Findings(**{**values, **changes})  # type: ignore[arg-type]
