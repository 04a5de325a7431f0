"""The words of an export: its promise as a sentence, and its model card. Both follow from what the manifest states.

The server writes them with these functions. Whoever checks an export writes them again and compares, so that an
export cannot say in words what its numbers do not; so every word here is part of the format of exports.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tg_tinker.exports.manifest import PEFT, Manifest, is_attested
from tg_tinker.exports.tar import BUNDLE, BUNDLE_KEY, REPORT, REPORT_PAGE, WEIGHTS
from tg_tinker.reports.statement import rounded_up, small


def guarantee(privacy: Mapping[str, Any] | None) -> str:
    """The promise as one sentence for people."""
    if privacy is None:
        return "Trained without differential privacy: nothing is promised about its training data."
    if is_attested(privacy):
        return _attested(privacy)
    if not math.isfinite(float(privacy["epsilon"])):
        return "An un-noised gradient was released in training: there is no finite guarantee."
    return _bound(privacy)


def _attested(privacy: Mapping[str, Any]) -> str:
    weights = (
        f"the weights of federated job `{privacy['dataset_id'].partition(':')[2]}` after round {privacy['round']}"
    )
    if not math.isfinite(float(privacy["epsilon"])):
        return f"Whoever brought {weights} promises nothing about its training data."
    return f"{_bound(privacy)} So stated by the caller who brought {weights}; it is in no ledger of this server."


def _bound(privacy: Mapping[str, Any]) -> str:
    what = "record" if privacy["unit"] == "datum" else privacy["unit"]
    epsilon, delta = rounded_up(float(privacy["epsilon"])), small(float(privacy["delta"]))
    return (
        f"Adding or removing one {what} of the training data changes the probability of any outcome of the training "
        f"by at most a factor of exp({epsilon}), except with probability {delta}."
    )


def model_card(manifest: Manifest, base_model: str, verifier_key: str) -> str:
    """README.md, with the metadata that model hubs read.

    Args:
        manifest: a readable one, so every text in it is of a narrow alphabet: no text of others gets into the card.
        base_model: where the base model is published, of the same alphabet.
    """
    claims = manifest.predicate
    model = json.dumps(base_model)
    earlier = [f"- {guarantee(p['privacy'])} (`{p['origin']}`)" for p in claims["provenance"]]
    is_adapter = claims["layout"] == PEFT
    use = (
        f"base = AutoModelForCausalLM.from_pretrained({model})\n"
        "model = PeftModel.from_pretrained(base, <this folder>)"
        if is_adapter
        else f"state = safetensors.torch.load_file(<this folder> + '/{WEIGHTS}')"
    )
    report = f"`{REPORT}` is the signed report on every run over that data, `{REPORT_PAGE}` the same to read."
    lines = [
        "---",
        f"base_model: {model}",
        *(("library_name: peft",) if is_adapter else ()),
        "tags: [differential-privacy, tg-tinker]" if _is_private(claims["privacy"]) else "tags: [tg-tinker]",
        "---",
        f"# Checkpoint {claims['artifact']['id']}",
        "",
        f"Weights after {claims['artifact']['step']} steps of fine-tuning `{claims['base_model']}`.",
        "",
        "## What it promises about its training data",
        "",
        guarantee(claims["privacy"]),
        *(("", report) if REPORT in manifest.files else ()),
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


def _is_private(privacy: Mapping[str, Any] | None) -> bool:
    if privacy is None:
        return False
    return not is_attested(privacy) or math.isfinite(float(privacy["epsilon"]))
