"""Checks an export's promise about its training data against the report inside it, and its words against both.

The manifest says what its signer promised when the weights were saved, and names the entry of the ledger that was the
last one then. The report lists every charge, and is checked like any other; here the two are held against each other,
so that not even the signer can state less than was charged up to that entry. That the weights are of that moment is
the signer's word, within limits: there are no more steps in them than charges before it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import rfc8785

from tg_tinker.exports.manifest import MODEL, PAYLOAD_TYPE, Manifest, is_attested, parse_payload
from tg_tinker.exports.reader import ExportReader
from tg_tinker.exports.tar import CARD, REPORT, REPORT_PAGE
from tg_tinker.ledger import LEDGER_DOMAIN, entry_hash
from tg_tinker.ledger.history import read_history
from tg_tinker.reports import recompute
from tg_tinker.reports import verify as _report  # noqa: F401 - registers the type of reports
from tg_tinker.reports.card import guarantee, model_card
from tg_tinker.reports.page import render
from tg_tinker.reports.statement import rounded_up
from tg_tinker.reports.verdicts import REGISTRY, Document, Trust, Verdict, refused
from tg_tinker.transparency._encoding import from_base64

MOST_VALUES: Final = 1_000_000
"""In a report that is imported: some 28,000 steps. Reading it takes a tenth to half a second."""
_MOST_IN_AN_ENVELOPE: Final = 20
_CARD_START = re.compile(rb'---\nbase_model: "([ -~]{1,200})"\n')


@REGISTRY.register(PAYLOAD_TYPE)
def verify_manifest(document: Document) -> Iterator[Verdict]:
    """Check a manifest by itself, without the files that it vouches for; see :meth:`Registry.verify`."""
    manifest = parse_payload(bytes(rfc8785.dumps(dict(document.value))))
    if manifest.origin != document.key.name:
        raise refused("origin", f"it says that it comes from {manifest.origin[:100]}, which is not who signed it")
    _check_sentence(manifest)
    yield Verdict("format", f"an export of checkpoint {manifest.predicate['artifact']['id']}, every field known")
    yield Verdict(
        "files", f"{len(manifest.files)} digests; `tg-tinker checkpoints verify` checks the files themselves"
    )


def check_export(reader: ExportReader, trust: Trust) -> Iterator[Verdict]:
    """Check what an export promises in its manifest; its files were checked by the reader.

    Args:
        trust: pins and receipts to hold the report against; its keys are not used, the export's signer counts.

    Raises:
        InvalidRequestError: the report is wrong, of other data, or says more than the manifest does.
    """
    manifest = reader.manifest
    yield Verdict("signature", f"signed by {reader.key.name} (key {reader.key.key_hash.hex()})")
    yield Verdict("files", f"{len(manifest.files)} files, each the one that was signed")
    _check_sentence(manifest)
    claim, envelope = manifest.predicate["privacy"], reader.files.get(REPORT)
    yield Verdict("promise", guarantee(claim))
    for earlier in manifest.predicate["provenance"]:
        yield Verdict("promise", f"also, on data behind {earlier['origin']}: {guarantee(earlier['privacy'])}")
    if claim is None:
        if envelope is not None:
            raise refused("promise", "it holds a report, and promises nothing")
        return
    if claim["initial_weights"] == "public":
        yield Verdict("promise", "it is on top of weights that are public by the word of who trained them")
    if is_attested(claim):
        if envelope is not None:
            raise refused("promise", "it holds a report, and its promise is in no ledger")
        yield Verdict(
            "report", "there is none: the promise is in no ledger, and is the word of who brought the weights"
        )
        return
    if envelope is None:
        yield Verdict("report", "there is none inside: the promise rests on the signer's word alone")
        return
    own = Trust(keys=[reader.key], pins=trust.pins, receipts=trust.receipts)
    for verdict in REGISTRY.verify(envelope, own):
        yield Verdict(f"report {verdict.check}", verdict.shows)
    report = _payload(envelope)
    spent = _spent_when_saved(manifest, report)
    entries = f"entry {claim['entries']} of {len(report['integrity']['entries'])}"
    yield Verdict(
        "promise",
        f"epsilon {rounded_up(spent)} is what the report's charges come to at {entries}; that these are the weights "
        "of that moment is the signer's word",
    )


def refuse_bulk(reader: ExportReader) -> None:
    """Refuse a report of more values than a server reads for a stranger; only counts, parses nothing.

    Small values cost 20 times their bytes as objects, and reading them holds up every thread of a process.

    Raises:
        InvalidRequestError: it has more.
    """
    envelope = reader.files.get(REPORT)
    if envelope is None:
        return
    if _values(envelope) > _MOST_IN_AN_ENVELOPE:
        raise refused("report", f"{REPORT} is not a signed envelope")
    try:
        payload = from_base64(json.loads(envelope)["payload"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise refused("report", f"{REPORT} is not a signed envelope") from e
    count = _values(payload)
    if count > MOST_VALUES:
        raise refused("report", f"it holds about {count:,} values, over the {MOST_VALUES:,} that are taken here")


def _values(data: bytes) -> int:
    return sum(data.count(mark) for mark in (b",", b"[", b"{"))


def check_words(reader: ExportReader) -> Iterator[Verdict]:
    """Check that the pages for people say what manifest and report say; call it after `check_export`.

    Raises:
        InvalidRequestError: the model card or the report's page is another than follows from them.
    """
    manifest = reader.manifest
    named = _CARD_START.match(reader.files[CARD])
    base_model = named[1].decode() if named else ""
    if MODEL.fullmatch(base_model) is None:
        raise refused("words", f"{CARD} does not begin with the name of a base model")
    if reader.files[CARD] != model_card(manifest, base_model, reader.key.text).encode():
        raise refused("words", f"{CARD} says other things than the manifest, or is of another version of tg-tinker")
    envelope, page = reader.files.get(REPORT), reader.files.get(REPORT_PAGE)
    expected = None if envelope is None else render(_payload(envelope)).encode()
    if page != expected:
        raise refused("words", f"{REPORT_PAGE} is not the page of the report, or of another version of tg-tinker")
    pages = CARD if page is None else f"{CARD} and {REPORT_PAGE}"
    yield Verdict("words", f"{pages} say this and nothing else; the base model's published name is the signer's word")


def _check_sentence(manifest: Manifest) -> None:
    if manifest.predicate["guarantee"] != guarantee(manifest.predicate["privacy"]):
        raise refused("promise", "its sentence is not the one that follows from its numbers")


def _payload(envelope: bytes) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(from_base64(json.loads(envelope)["payload"]))
    return report


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
    fault = recompute.last_fault(read_history(claim["dataset_id"], bodies[:count]))
    if fault is not None:
        raise refused("promise", f"the charge at position {fault.position} is wrong: {fault.why}")
    charges = [float(b["epsilon_after"]) for b in bodies[:count] if b["kind"] == "charge"]
    spent = charges[-1] if charges else 0.0
    if not math.isclose(spent, manifest.epsilon, rel_tol=1e-9, abs_tol=1e-12):
        raise refused(
            "promise", f"the manifest states epsilon {manifest.epsilon}, and {spent} was charged when it was saved"
        )
    step = manifest.predicate["artifact"]["step"]
    # Weights that began elsewhere have steps that were paid for elsewhere, and say so.
    began_here = not manifest.predicate["provenance"] and claim["initial_weights"] == "base"
    if began_here and step > len(charges):
        raise refused(
            "promise", f"its weights are of {step} steps, and {len(charges)} were charged up to the entry it names"
        )
    return spent
