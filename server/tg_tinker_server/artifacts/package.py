"""The documents of an export: PEFT's configuration, model card, manifest, bundle. Values in, bytes out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rfc8785

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports.manifest import PAYLOAD_TYPE, PEFT, PLAIN, Manifest
from tg_tinker.exports.model_signing import make_bundle
from tg_tinker.exports.tar import (
    ADAPTER,
    ADAPTER_CONFIG,
    BUNDLE,
    BUNDLE_KEY,
    CARD,
    LARGEST_BYTES,
    MANIFEST,
    REPORT,
    REPORT_PAGE,
    WEIGHTS,
)
from tg_tinker.reports.statement import rounded_up, small
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
        InvalidRequestError: a document would be larger than readers take.
    """
    privacy = privacy_claim(source.state)
    files = dict(source.report)
    if source.layout == PEFT:
        files[ADAPTER_CONFIG] = _json(adapter_config(source))
    files[CARD] = model_card(source, privacy, signer.verifier_key).encode()
    files[BUNDLE_KEY] = model_signer.public_pem
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    digests[source.weights_name] = weights_digest
    manifest = Manifest(files=digests, predicate=predicate(source, privacy, signer.origin))
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
    return {**claim, "unit": ledger.get("unit") or dp.get("privacy_unit", "datum")}


def guarantee(privacy: Mapping[str, Any] | None) -> str:
    """The claim as one sentence for people."""
    if privacy is None:
        return "Trained without differential privacy: nothing is promised about its training data."
    if not math.isfinite(float(privacy["epsilon"])):
        return "An un-noised gradient was released in training: there is no finite guarantee."
    what = "record" if privacy["unit"] == "datum" else privacy["unit"]
    epsilon, delta = rounded_up(float(privacy["epsilon"])), small(float(privacy["delta"]))
    return (
        f"Adding or removing one {what} of the training data changes the probability of any outcome of the training "
        f"by at most a factor of exp({epsilon}), except with probability {delta}."
    )


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
    if isinstance(targets, str):
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


def model_card(source: Source, privacy: Mapping[str, Any] | None, verifier_key: str) -> str:
    """README.md, with the metadata that model hubs read. Nothing in it was written by a user but names of models."""
    state = source.state
    model = json.dumps(str(source.base_model))
    earlier = [f"- {guarantee(p['privacy'])} (`{p['origin'] or 'this log'}`)" for p in state.get("provenance", [])]
    use = (
        f"base = AutoModelForCausalLM.from_pretrained({model})\n"
        "model = PeftModel.from_pretrained(base, <this folder>)"
        if source.layout == PEFT
        else f"state = safetensors.torch.load_file(<this folder> + '/{WEIGHTS}')"
    )
    report = f"`{REPORT}` is the signed report on every run over that data, `{REPORT_PAGE}` the same to read."
    lines = [
        "---",
        f"base_model: {model}",
        *(("library_name: peft",) if source.layout == PEFT else ()),
        "tags: [differential-privacy, tg-tinker]" if privacy else "tags: [tg-tinker]",
        "---",
        f"# Checkpoint {source.artifact_id}",
        "",
        f"Weights after {int(state['step'])} steps of fine-tuning `{state['config']['model_ref']}`.",
        "",
        "## What it promises about its training data",
        "",
        guarantee(privacy),
        *(("", report) if source.report else ()),
        *(
            ("", "It was trained further from weights that came with promises of their own:", "", *earlier)
            if earlier
            else ()
        ),
        "",
        "## Use",
        "",
        "```python",
        use,
        "```",
        "",
        "## Check",
        "",
        "The manifest is signed; ask the sender, by another way than this file, whether this is their key:",
        "",
        f"    {verifier_key}",
        "",
        f"    tg-tinker checkpoints verify . --signer {verifier_key}",
        f"    model_signing verify key . --signature {BUNDLE} --public_key {BUNDLE_KEY}",
        "",
    ]
    return "\n".join(lines)


def _lora_claim(lora: Any) -> Any:
    # Decimal fractions as text: RFC 8785 would write 32.0 as 32, and a reader must get back what was meant.
    return None if lora is None else {**lora, "alpha": repr(lora["alpha"]), "dropout": repr(lora["dropout"])}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
