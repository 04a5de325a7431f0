"""The checkpoint seen again: pulled as ciphertext and hashed, then opened in a client that never trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tg_tinker import ServiceClient
from tg_tinker_server.demo.measure import perplexity
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Reopened:
    """What the checkpoint is after a round trip through encryption and disk."""

    perplexity: float
    trainable_parameters: int
    ciphertext_matches: bool


def reopen(
    service: ServiceClient, checkpoint: Checkpoint, held_out: Sequence[str], settings: DemoSettings
) -> Reopened:
    """Open a checkpoint without touching the budget: reading a released model is post-processing and free.

    Raises:
        InvalidRequestError: it was altered; nothing of it is loaded.
    """
    ciphertext = service.pull_artifact(checkpoint.artifact_id)
    reader = service.create_training_client(settings.reader_config())
    try:
        reader.load_state(checkpoint.artifact_id)
        return Reopened(
            perplexity=perplexity(reader, held_out, batch_size=settings.micro_batch_size),
            trainable_parameters=reader.get_info().trainable_parameters,
            ciphertext_matches=f"sha256:{hashlib.sha256(ciphertext).hexdigest()}" == checkpoint.content_hash,
        )
    finally:
        service.delete_training_client(reader.id)
