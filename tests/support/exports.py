"""A small export, made with the server's own parts and no server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from tg_tinker.exports.model_signing import make_bundle
from tg_tinker.exports.tar import BUNDLE, MANIFEST, ORDER, write_tar
from tg_tinker.tensor_file import WEIGHTS_METADATA, header_bytes
from tg_tinker.transparency.note import VerifierKey
from tg_tinker_server.artifacts.package import Source, documents
from tg_tinker_server.crypto.signing import ModelSigner, Signer

ARTIFACT = "ckpt_0123456789abcdef"
SIGNER, MODEL_SIGNER = Signer(b"s" * 32), ModelSigner(b"m" * 32)
KEY = VerifierKey.parse(SIGNER.verifier_key)
LORA = {
    "rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj"], "bias": "none", "modules_to_save": [],
}  # fmt: skip
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WEIGHTS = header_bytes([(NAME, "F32", (2, 3), 24)], WEIGHTS_METADATA) + bytes(range(24))
CLAIM = {
    "dataset_id": "data", "delta": "1e-05", "entries": 3, "epsilon": "1.5", "head": "ab" * 32,
    "initial_weights": "base", "unit": "datum",
}  # fmt: skip


def source(**changes: Any) -> Source:
    state = {
        "step": 7,
        "saved": "2026-01-02T03:04:05+00:00",
        "run_id": "run_1",
        "config": {"model_ref": "tiny-llama-2m", "lora_config": LORA},
        "ledger": None,
        "provenance": [],
        **changes,
    }
    return Source(
        artifact_id=ARTIFACT,
        content_hash="sha256:" + "00" * 32,
        state=state,
        weight_names=[NAME],
        base_model="org/tiny-llama",
        report={},
        exported="2026-01-02T03:05:00+00:00",
        server_version="0.0.0",
    )


def files(made: Source | None = None, *, signer: Signer = SIGNER, weights: bytes = WEIGHTS) -> dict[str, bytes]:
    """Every file of an export, by name."""
    made = made or source()
    digest = hashlib.sha256(weights).hexdigest()
    return {**documents(made, digest, signer, MODEL_SIGNER), made.weights_name: weights}


def with_manifest(contents: Mapping[str, bytes], manifest: bytes) -> dict[str, bytes]:
    """An export with another manifest, and a bundle to match: what its signer can do."""
    changed = {**contents, MANIFEST: manifest}
    digests = {n: hashlib.sha256(d).hexdigest() for n, d in changed.items() if n != BUNDLE}
    changed[BUNDLE] = make_bundle(ARTIFACT, digests, MODEL_SIGNER.public_pem, MODEL_SIGNER.sign)
    return changed


def archive(contents: Mapping[str, bytes] | None = None, folder: str = ARTIFACT) -> bytes:
    """Files as an archive, in order."""
    contents = files() if contents is None else contents
    ordered = sorted(contents, key=ORDER.__getitem__)
    members = [(name, len(contents[name]), [contents[name]]) for name in ordered]
    return b"".join(bytes(piece) for piece in write_tar(folder, members))
