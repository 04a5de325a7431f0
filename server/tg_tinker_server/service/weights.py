"""Plain weights out of a run and into a checkpoint, for parties of a federation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.federation import LARGEST_WEIGHTS_BYTES, AdapterWeights
from tg_tinker.wire.federation import NewWeights, weights_file
from tg_tinker_server.artifacts.weights import put_plain_weights, weights_of
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.durability import now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.intake import Intake, Opened
from tg_tinker_server.service.lineage import IMPORTED, federation_entry
from tg_tinker_server.service.runs import RunRegistry
from tg_tinker_server.service.uploads import Places
from tg_tinker_server.store.artifact_rows import ArtifactRow

PULL, IMPORT = "pull_weights", "import_weights"


@dataclass(frozen=True, slots=True)
class WeightsService:
    """Plain weights, out and in.

    Attributes:
        places: how many pulls of a tenant may be under way; each holds a copy of the weights.
    """

    registry: RunRegistry
    audit: AuditLog
    executors: Executors
    intake: Intake
    checkpoints: CheckpointService
    places: Places = field(default_factory=Places)

    @asynccontextmanager
    async def pull(self, caller: Caller, run_id: str) -> AsyncIterator[AdapterWeights]:
        """The weights of a run as its last settled operation left them; noted in the audit log beforehand.

        Gradients that wait for their step are no part of them.

        Raises:
            ResourceNotFoundError: there is no such run of this tenant.
            ServerError: an operation of the run failed half-way, so there are no settled weights in memory.
        """
        started = now()
        run = await self.registry.get(caller, run_id)
        async with self.places.of(caller.tenant):
            async with run.weights:
                run.require_intact()
                engine = await self.executors.compute(run.session.export_state, optimizer=False)
                step = run.step
            weights = AdapterWeights(tensors=weights_of(engine.tensors), step=step)
            size, digest = await self.executors.io(_measure, weights)
            record = AuditRecord(
                operation=PULL,
                run_id=run_id,
                request_hash="",
                request_bytes=size,
                artifact_ids=(),
                started=started,
                completed=now(),
                success=True,
                error_code="",
                dp_metrics=None,
                actor=caller.key_id,
                # Keyed: exact weights of small data could be confirmed by guessing.
                facts={"step": str(step), "digest": run.mac_text("weights", digest)},
            )
            await self.executors.io(self.audit.append(caller.tenant, record).result)
            yield weights

    async def take(self, caller: Caller, new: NewWeights, data: AsyncIterator[bytes]) -> ArtifactRow:
        """Keep plain weights as a checkpoint of the caller's tenant. They stream through.

        What is promised about the data behind them is the caller's word, and is marked as that wherever it goes.

        Raises:
            InvalidRequestError: not a file of finite float32 tensors of the size announced, or it comes too slowly.
        """

        def opening(artifact_id: str, pieces: Iterator[bytes]) -> Opened[None]:
            entry = federation_entry(new.source, artifact_id, new.base_model)
            lora = None if new.lora_config is None else json.loads(new.lora_config.model_dump_json())
            state = {
                "engine": {"model": new.base_model, "optimizer": None},
                "step": new.step,
                "run_id": IMPORTED,
                "config": {"model_ref": new.base_model, "lora_config": lora},
                "metadata": {},
                "optimizer": False,
                "saved": now().isoformat(),
                "ledger": entry["privacy"],
                "provenance": [entry],
            }
            modules = [] if new.lora_config is None else new.lora_config.modules_to_save
            plaintext = put_plain_weights(pieces, new.size_bytes, state, modules)
            return Opened(plaintext=plaintext, step=new.step, facts={}, about=None)

        source = new.source
        facts = {
            "job": source.job,
            "round": str(source.round),
            "epsilon": repr(float(source.epsilon)),
            "delta": repr(float(source.delta)),
        }
        row, _ = await self.intake.take(caller, data, opening, operation=IMPORT, what="weights", facts=facts)
        return row


def _measure(weights: AdapterWeights) -> tuple[int, bytes]:
    """Size and SHA-256 of the file that carries them."""
    size, pieces = weights_file(weights.tensors)
    if size > LARGEST_WEIGHTS_BYTES:
        raise InvalidRequestError(
            f"the weights have {size} bytes, over the {LARGEST_WEIGHTS_BYTES} of one call; save a checkpoint and "
            "export that",
            field="training_client_id",
            constraint=f"at most {LARGEST_WEIGHTS_BYTES} bytes of weights",
        )
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return size, digest.digest()
