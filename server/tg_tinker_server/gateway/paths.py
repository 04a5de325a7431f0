"""Addresses of checkpoints: ``tinker://<model>/<kind>/<name>`` there, ``tg://<run>/<kind>/<name>`` here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tg_tinker_server.gateway import names
from tg_tinker_server.service.weight_files import RECIPIENTS
from tg_tinker_server.store.artifact_rows import ArtifactRow

KINDS: dict[str, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


def tinker_path(model_id: str, path: str) -> str:
    """The address of a model's checkpoint in the protocol, of its address here."""
    return f"tinker://{model_id}/" + path.removeprefix("tg://").partition("/")[2]


def checkpoint_path(model_id: str, kind: str, name: str) -> str:
    """The address that a request's path names.

    Raises:
        ResourceNotFoundError: no such kind or model.
    """
    if kind not in KINDS or not names.is_model(model_id):
        raise names.not_found("checkpoint", f"{kind}/{name}")
    return f"tinker://{model_id}/{kind}/{name}"


def shown(model_id: str, path: str, row: ArtifactRow, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """A checkpoint as the protocol shows it; ``None`` for one without a kind that the protocol knows."""
    parts = path.removeprefix("tg://").split("/")
    if len(parts) != 3 or parts[1] not in KINDS:
        return None
    said = {str(k): str(v) for k, v in metadata.items() if k != RECIPIENTS}
    return {
        "checkpoint_id": f"{parts[1]}/{parts[2]}",
        "checkpoint_type": KINDS[parts[1]],
        "time": row.created.isoformat(),
        "tinker_path": tinker_path(model_id, path),
        "size_bytes": row.size_bytes,
        "public": False,
        "user_metadata": said or None,
        "expires_at": row.expires.isoformat() if row.expires else None,
    }
