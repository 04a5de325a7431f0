"""The signed manifest of an export: which files, from which log, and what was promised about the data.

An in-toto Statement v1 (https://in-toto.io/Statement/v1) in RFC 8785 form inside a DSSE envelope, signed with the
key that signs the tenant's log. Whoever knows that key's verifier key needs nothing else to trust the files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import rfc8785

from tg_tinker.errors import LogVerificationError
from tg_tinker.exports.errors import refused
from tg_tinker.exports.tar import FOLDER, LARGEST_BYTES, MANIFEST
from tg_tinker.transparency._encoding import from_base64
from tg_tinker.transparency.dsse import open_envelope
from tg_tinker.transparency.note import VerifierKey
from tg_tinker.types import DPConfig

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:tg-tinker:export:v1"
PEFT, PLAIN = "peft", "weights"
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,199}", re.ASCII)
"""Names of models. They stand on model cards, signed: no spaces, so no sentences; no marks that Markdown obeys."""
UNITS = frozenset(get_args(DPConfig.model_fields["privacy_unit"].annotation))
ORIGIN = re.compile(r"tg-tinker/[0-9a-f]{32}", re.ASCII)
"""Logs of tenants, and the names of the keys that sign them."""
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_FEDERATION = re.compile(r"federation:[0-9a-f]{64}", re.ASCII)
NO_HEAD = "00" * 32
"""Stands for the head of a ledger where there is none."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}(Z|[+-][0-9]{2}:[0-9]{2})", re.ASCII)
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,50}", re.ASCII)
_PREDICATE = {
    "artifact": {"content_hash": str, "id": str, "saved": str, "step": int},
    "base_model": str,
    "exported": str,
    "guarantee": str,
    "layout": str,
    "lora_config": (dict, type(None)),
    "origin": str,
    "privacy": (dict, type(None)),
    "provenance": list,
    "server_version": str,
}  # fmt: skip
_PRIVACY = {"dataset_id", "delta", "entries", "epsilon", "head", "initial_weights", "unit"}
ATTESTED = frozenset({"attested_by", "round"})
"""In a promise that stands in no ledger: who stated it, and after which round of a federation."""
_PROVENANCE = {"artifact", "base_model", "manifest", "origin", "privacy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an export says of itself.

    Attributes:
        files: SHA-256 in hex of every file but the manifest and the bundle, by name.
        predicate: the claims, checked for shape; ``privacy`` is ``None`` where training was not private.
    """

    files: Mapping[str, str]
    predicate: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """The log of the tenant that exported it."""
        return str(self.predicate["origin"])

    @property
    def epsilon(self) -> float:
        """Spent on the training data when the artifact was saved; infinite without privacy."""
        privacy = self.predicate["privacy"]
        return math.inf if privacy is None else float(privacy["epsilon"])

    def payload(self) -> bytes:
        """The statement, canonical: what is signed."""
        subjects: list[Any] = [{"digest": {"sha256": d}, "name": n} for n, d in sorted(self.files.items())]
        statement: dict[str, Any] = {
            "_type": STATEMENT_TYPE,
            "predicate": dict(self.predicate),
            "predicateType": PREDICATE_TYPE,
            "subject": subjects,
        }
        return bytes(rfc8785.dumps(statement))


def open_manifest(data: bytes, key: VerifierKey) -> Manifest:
    """Read a manifest that ``key`` signed, in its one spelling.

    Raises:
        LogVerificationError: signed by another key or by none, or altered.
        InvalidRequestError: signed, and still not a manifest.
    """
    envelope = read_json(data, MANIFEST)
    payload = open_envelope(envelope, key, payload_type=PAYLOAD_TYPE)
    if len(envelope["signatures"]) != 1:
        raise refused("its manifest has more than one signature")
    manifest = parse_payload(payload)
    if manifest.origin != key.name:
        raise LogVerificationError(
            f"the export says it comes from {manifest.origin[:100]}, and was signed by {key.name}",
            kind="bad_signature",
        )
    return manifest


def claimed_origin(data: bytes) -> str:
    """Where a manifest says it comes from: a claim that nobody checked yet, to look a key up by."""
    try:
        payload = from_base64(read_json(data, MANIFEST)["payload"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise refused("its manifest is not a signed envelope") from e
    return parse_payload(payload).origin


def parse_payload(payload: bytes) -> Manifest:
    """Read a statement.

    Raises:
        InvalidRequestError: a field is missing, unknown, or of another kind.
    """
    value = read_json(payload, "statement")
    if set(value) != {"_type", "predicate", "predicateType", "subject"} or value["_type"] != STATEMENT_TYPE:
        raise refused("its manifest is not an in-toto statement")
    if value["predicateType"] != PREDICATE_TYPE:
        raise refused(
            f"its manifest is of the type {str(value['predicateType'])[:100]!r}, which this version does not know"
        )
    files = _files(value["subject"])
    predicate = value["predicate"]
    if not _shaped(predicate, _PREDICATE) or predicate["layout"] not in {PEFT, PLAIN}:
        raise refused("its manifest lacks a field or has one too many")
    _check_texts(predicate)
    for earlier in predicate["provenance"]:
        if not isinstance(earlier, dict) or set(earlier) != _PROVENANCE:
            raise refused("its manifest tells of an earlier origin in an unknown form")
    for claims in (predicate, *predicate["provenance"]):
        if claims["privacy"] is not None:
            _check_privacy(claims["privacy"])
    _check_origins(predicate)
    return Manifest(files=files, predicate=predicate)


def read_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object in RFC 8785 form.

    Raises:
        InvalidRequestError: anything else, be it only a space.
    """
    if data.count(b"[") + data.count(b"{") > 100_000 or len(data) > LARGEST_BYTES.get(what, 2**20):
        raise refused(f"its {what} is too large")
    try:
        value = json.loads(data)
        canonical = rfc8785.dumps(value)
    except (ValueError, RecursionError) as e:
        raise refused(f"its {what} is not JSON") from e
    if canonical != data or not isinstance(value, dict):
        raise refused(f"its {what} is not in canonical form (RFC 8785)")
    return value


def _files(subjects: Any) -> dict[str, str]:
    files: dict[str, str] = {}
    for subject in subjects if isinstance(subjects, list) else [None]:
        if not isinstance(subject, dict) or set(subject) != {"digest", "name"}:
            raise refused("its manifest does not list files as names and digests")
        digest, name = subject["digest"], subject["name"]
        if not isinstance(digest, dict) or set(digest) != {"sha256"} or _HEX.fullmatch(str(digest["sha256"])) is None:
            raise refused("its manifest has a digest that is not SHA-256")
        if name not in LARGEST_BYTES or name in files:
            raise refused("its manifest lists a file that no export has, or one twice")
        files[name] = digest["sha256"]
    if list(files) != sorted(files):
        raise refused("its manifest lists files out of order")
    return files


def _shaped(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        return (
            isinstance(value, dict) and set(value) == set(shape) and all(_shaped(value[k], shape[k]) for k in shape)
        )
    return isinstance(value, shape) and not isinstance(value, bool)


def _check_texts(predicate: Mapping[str, Any]) -> None:
    """Whoever imports this signs some of it again, so no text in it may be free."""
    artifact = predicate["artifact"]
    for name, value, form in (
        ("artifact.id", artifact["id"], FOLDER),
        ("artifact.content_hash", artifact["content_hash"], _DIGEST),
        ("artifact.saved", artifact["saved"], _TIME),
        ("base_model", predicate["base_model"], MODEL),
        ("exported", predicate["exported"], _TIME),
        ("origin", predicate["origin"], ORIGIN),
        ("server_version", predicate["server_version"], _VERSION),
    ):
        if form.fullmatch(value) is None:
            raise refused(f"{name} in its manifest is not of the form that it has")
    if artifact["step"] < 0:
        raise refused("its manifest does not say after how many steps it was saved")


def _check_origins(predicate: Mapping[str, Any]) -> None:
    for earlier in predicate["provenance"]:
        forms = {"artifact": FOLDER, "base_model": MODEL, "origin": ORIGIN}
        if earlier["manifest"] != "":
            forms["manifest"] = _DIGEST
        for name, form in forms.items():
            if not isinstance(earlier[name], str) or form.fullmatch(earlier[name]) is None:
                raise refused(f"{name} of an earlier origin in its manifest is not of the form that it has")


def _check_privacy(privacy: Any) -> None:
    if not isinstance(privacy, dict) or set(privacy) not in (_PRIVACY, _PRIVACY | ATTESTED):
        raise refused("its manifest states privacy in an unknown form")
    texts = [privacy[k] for k in ("dataset_id", "delta", "epsilon", "head", "initial_weights", "unit")]
    if not all(isinstance(t, str) for t in texts) or type(privacy["entries"]) is not int:
        raise refused("its manifest states privacy in an unknown form")
    dataset_id = privacy["dataset_id"]
    if (
        privacy["unit"] not in UNITS
        or privacy["initial_weights"] not in {"base", "public"}
        or _HEX.fullmatch(privacy["head"]) is None
        or not 0 < len(dataset_id) <= 200
        or not dataset_id.isprintable()
    ):
        raise refused("its manifest names a privacy unit, dataset or head that cannot be")
    try:
        epsilon, delta = float(privacy["epsilon"]), float(privacy["delta"])
    except ValueError as e:
        raise refused("its epsilon or delta is not a number") from e
    if (
        not epsilon >= 0
        or not 0 < delta < 1
        or repr(epsilon) != privacy["epsilon"]
        or repr(delta) != privacy["delta"]
    ):
        raise refused("its epsilon or delta is impossible")
    if is_attested(privacy):
        _check_attested(privacy)


def is_attested(privacy: Mapping[str, Any]) -> bool:
    """Whether a promise was stated by whoever brought the weights, and stands in no ledger."""
    return "attested_by" in privacy


def _check_attested(privacy: Mapping[str, Any]) -> None:
    round_ = privacy["round"]
    if (
        privacy["attested_by"] != "caller"
        or _FEDERATION.fullmatch(privacy["dataset_id"]) is None
        or type(round_) is not int
        or round_ < 0
        or privacy["initial_weights"] != "base"
        or privacy["entries"] != 0
        or privacy["head"] != NO_HEAD
    ):
        raise refused("it states a promise that is in no ledger in an unknown form")
