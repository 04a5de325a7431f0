"""Checks an export's promise about its training data against the report inside it.

The manifest says what its signer promised when the weights were saved. The report lists every charge, and is checked
like any other; here the two are held against each other, so that not even the signer can state less than was spent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import rfc8785

from tg_tinker.exports.manifest import PAYLOAD_TYPE, Manifest, parse_payload
from tg_tinker.exports.reader import ExportReader
from tg_tinker.exports.tar import REPORT
from tg_tinker.ledger import LEDGER_DOMAIN, entry_hash
from tg_tinker.reports import verify as _report  # noqa: F401 - registers the type of reports
from tg_tinker.reports.statement import rounded_up
from tg_tinker.reports.verdicts import REGISTRY, Document, Trust, Verdict, refused
from tg_tinker.transparency._encoding import from_base64


@REGISTRY.register(PAYLOAD_TYPE)
def verify_manifest(document: Document) -> Iterator[Verdict]:
    """Check a manifest by itself, without the files that it vouches for; see :meth:`Registry.verify`."""
    manifest = parse_payload(bytes(rfc8785.dumps(dict(document.value))))
    if manifest.origin != document.key.name:
        raise refused("origin", f"it says that it comes from {manifest.origin[:100]}, which is not who signed it")
    yield Verdict("format", f"an export of checkpoint {manifest.predicate['artifact']['id']}, every field known")
    yield Verdict(
        "files", f"{len(manifest.files)} digests; `tg-tinker checkpoints verify` checks the files themselves"
    )


def check_export(reader: ExportReader, trust: Trust) -> Iterator[Verdict]:
    """Check what an export promises; its files were checked by the reader.

    Args:
        trust: pins and receipts to hold the report against; its keys are not used, the export's signer counts.

    Raises:
        InvalidRequestError: the report is wrong, of other data, or states more than the manifest.
    """
    manifest = reader.manifest
    yield Verdict("signature", f"signed by {reader.key.name} (key {reader.key.key_hash.hex()})")
    yield Verdict("files", f"{len(manifest.files)} files, each the one that was signed")
    claim, envelope = manifest.predicate["privacy"], reader.files.get(REPORT)
    yield Verdict("promise", str(manifest.predicate["guarantee"]))
    if claim is None:
        if envelope is not None:
            raise refused("promise", "it holds a report, and promises nothing")
        return
    if envelope is None:
        yield Verdict("report", "there is none inside: the promise rests on the signer's word alone")
        return
    own = Trust(keys=[reader.key], pins=trust.pins, receipts=trust.receipts)
    for verdict in REGISTRY.verify(envelope, own):
        yield Verdict(f"report {verdict.check}", verdict.shows)
    spent = _spent_when_saved(manifest, json.loads(from_base64(json.loads(envelope)["payload"])))
    yield Verdict("promise", f"epsilon {rounded_up(spent)} is what the report's charges say of these weights")


def _spent_when_saved(manifest: Manifest, report: Mapping[str, Any]) -> float:
    """Epsilon after the entries that stood in the ledger when the weights were saved, equal to the claim."""
    claim = manifest.predicate["privacy"]
    if report.get("format") is None or report.get("dataset_id") != claim["dataset_id"]:
        raise refused("promise", "the report inside is of another dataset than the manifest names")
    if report["guarantee"]["delta"] != claim["delta"] or report["guarantee"]["privacy_unit"] != claim["unit"]:
        raise refused("promise", "the report inside states another delta or another unit than the manifest")
    bodies = [entry["body"] for entry in report["integrity"]["entries"]]
    count = claim["entries"]
    if not 0 < count <= len(bodies) or entry_hash(LEDGER_DOMAIN, bodies[count - 1]).hex() != claim["head"]:
        raise refused("promise", "the ledger head that the manifest names is not in the report inside")
    charges = [float(b["epsilon_after"]) for b in bodies[:count] if b["kind"] == "charge"]
    spent = charges[-1] if charges else 0.0
    if not math.isclose(spent, manifest.epsilon, rel_tol=1e-9, abs_tol=1e-12):
        raise refused(
            "promise", f"the manifest states epsilon {manifest.epsilon}, and {spent} was charged when it was saved"
        )
    return spent
