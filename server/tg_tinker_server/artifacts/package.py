"""The documents of an export: PEFT's configuration, card, manifest, bundle. Values in, bytes out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rfc8785

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports.manifest import ATTESTED, MODEL, PAYLOAD_TYPE, PEFT, PLAIN, Manifest, parse_payload
from tg_tinker.exports.model_signing import make_bundle
from tg_tinker.exports.tar import (
    ADAPTER,
    ADAPTER_CONFIG,
    BUNDLE,
    BUNDLE_KEY,
    CARD,
    LARGEST_BYTES,
    MANIFEST,
    WEIGHTS,
)
from tg_tinker.reports.card import guarantee, model_card
from tg_tinker_server.artifacts.weights import PEFT_PREFIX
from tg_tinker_server.crypto.signing import ModelSigner, Signer

_LORA = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What an export is made from.

    Attributes:
        state: of the checkpoint.
        weight_names: of its weights, as the engine knows them.
        base_model: what PEFT looks the base model up by: a hub id, or the name it has on this server.
        report: the signed report on its dataset and the page made of it; empty without privacy.
    """

    artifact_id: str
    content_hash: str
    state: Mapping[str, Any]
    weight_names: list[str]
    base_model: str
    report: Mapping[str, bytes]
    exported: str
    server_version: str

    @property
    def layout(self) -> str:
        """How its weights are handed out."""
        return PEFT if all(n.startswith(PEFT_PREFIX) for n in self.weight_names) else PLAIN

    @property
    def weights_name(self) -> str:
        """The file that holds its weights."""
        return ADAPTER if self.layout == PEFT else WEIGHTS


def documents(source: Source, weights_digest: str, signer: Signer, model_signer: ModelSigner) -> dict[str, bytes]:
    """Every file of an export but the weights, by name.

    Args:
        weights_digest: SHA-256 of the file of weights, hex.

    Raises:
        InvalidRequestError: a document would be larger than readers take, or hold a text that they refuse.
    """
    files = dict(source.report)
    if source.layout == PEFT:
        files[ADAPTER_CONFIG] = _json(adapter_config(source))
    files[BUNDLE_KEY] = model_signer.public_pem
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    digests[source.weights_name] = weights_digest
    claims = predicate(source, privacy_claim(source.state), signer.origin)
    files[CARD] = model_card(_readable(digests, claims), _model_name(source), signer.verifier_key).encode()
    digests[CARD] = hashlib.sha256(files[CARD]).hexdigest()
    manifest = Manifest(files=digests, predicate=claims)
    files[MANIFEST] = bytes(rfc8785.dumps(signer.sign_dsse(PAYLOAD_TYPE, manifest.payload())))
    digests[MANIFEST] = hashlib.sha256(files[MANIFEST]).hexdigest()
    files[BUNDLE] = make_bundle(source.artifact_id, digests, model_signer.public_pem, model_signer.sign)
    for name, data in files.items():
        if len(data) > LARGEST_BYTES[name]:
            raise InvalidRequestError(
                f"{name} of this export would have {len(data)} bytes, over {LARGEST_BYTES[name]}",
                field="artifact_id",
                constraint=f"{name} of at most {LARGEST_BYTES[name]} bytes",
            )
    return files


def privacy_claim(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was promised about the training data when the checkpoint was saved; ``None`` without privacy."""
    ledger = state["ledger"]
    if ledger is None:
        return None
    dp = state["config"].get("dp_config") or {}
    claim = {k: ledger[k] for k in ("dataset_id", "delta", "entries", "epsilon", "head", "initial_weights")}
    stated = {k: ledger[k] for k in ATTESTED if k in ledger}
    return {**claim, **stated, "unit": ledger.get("unit") or dp.get("privacy_unit", "datum")}


def predicate(source: Source, privacy: Mapping[str, Any] | None, origin: str) -> dict[str, Any]:
    """The claims of the manifest."""
    state = source.state
    return {
        "artifact": {
            "content_hash": source.content_hash,
            "id": source.artifact_id,
            "saved": state["saved"],
            "step": int(state["step"]),
        },
        "base_model": state["config"]["model_ref"],
        "exported": source.exported,
        "guarantee": guarantee(privacy),
        "layout": source.layout,
        "lora_config": _lora_claim(state["config"].get("lora_config")),
        "origin": origin,
        "privacy": privacy,
        "provenance": [{**p, "origin": p["origin"] or origin} for p in state.get("provenance", [])],
        "server_version": source.server_version,
    }


def adapter_config(source: Source) -> dict[str, Any]:
    """PEFT's configuration. Target modules given as names are PEFT's own rule; otherwise every path is listed."""
    lora = source.state["config"]["lora_config"]
    targets = lora["target_modules"]
    if isinstance(targets, str) or any(t.startswith("@") for t in targets):  # groups of modules are ours, not PEFT's
        targets = sorted(
            {n.removeprefix(PEFT_PREFIX).split(p)[0] for n in source.weight_names for p in _LORA if p in n}
        )
    return {
        "base_model_name_or_path": source.base_model,
        "bias": lora["bias"],
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "modules_to_save": lora["modules_to_save"] or None,
        "peft_type": "LORA",
        "r": lora["rank"],
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }


def _readable(files: Mapping[str, str], claims: Mapping[str, Any]) -> Manifest:
    """The manifest so far, if readers would take it: nothing is signed that they refuse."""
    try:
        return parse_payload(Manifest(files=files, predicate=claims).payload())
    except InvalidRequestError as e:
        raise InvalidRequestError(
            f"this checkpoint cannot be exported, readers would refuse it: {e.message}",
            field="artifact_id",
            constraint="names of models of letters, digits and ._/:@+-",
        ) from e


def _model_name(source: Source) -> str:
    if MODEL.fullmatch(source.base_model) is None:
        raise InvalidRequestError(
            "the base model's name here or on its hub does not fit into a model card; rename it in the server's "
            "configuration",
            field="artifact_id",
            constraint="letters, digits and ._/:@+-, at most 200",
        )
    return source.base_model


def _lora_claim(lora: Any) -> Any:
    if lora is None:
        return None
    # What a run left untrained says nothing of the adapter, and older readers refuse fields that they do not know.
    shape = {k: v for k, v in lora.items() if k != "frozen_factor"}
    # Decimal fractions as text: RFC 8785 would write 32.0 as 32, and a reader must get back what was meant.
    return {**shape, "alpha": repr(lora["alpha"]), "dropout": repr(lora["dropout"])}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
