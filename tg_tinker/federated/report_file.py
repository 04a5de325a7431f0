"""Writes a federation report down: the signed file that counts, and a page of it for people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.federated import report_verify as _verify  # noqa: F401 - registers the type
from tg_tinker.federated.report import (
    coordinator_key,
    document,
    read_statements,
    sign_report,
    signed_by_coordinator,
    site_level_epsilon,
)
from tg_tinker.federated.report_facts import Facts
from tg_tinker.federated.report_page import render
from tg_tinker.federated.result import FederatedResult
from tg_tinker.reports.verdicts import MAX_BYTES, REGISTRY, Trust, Verdict

REPORT_NAME: Final = "federation-report.json"
PAGE_NAME: Final = "federation-report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenReport:
    """What was written.

    Attributes:
        report, page: the files.
        sentence: the guarantee.
        verifier_key: of the coordinator, as ``audit verify --key`` takes it.
        verdicts: of the checks, which all passed.
    """

    report: Path
    page: Path
    sentence: str
    verifier_key: str
    verdicts: Sequence[Verdict]


def write_report(
    result: FederatedResult, key: Ed25519PrivateKey, folder: Path, *, site_level_report: bytes | None = None
) -> WrittenReport:
    """Write the report on a job, signed by its coordinator, and its page. It is checked before it is written.

    Args:
        key: the coordinator's identity.
        folder: made where it is not there; files of an earlier report in it are replaced.
        site_level_report: where the job protects whole sites, the signed report on their ledger, as
            ``service.get_signed_report(result.sites.dataset_id)`` gives it.

    Raises:
        InvalidRequestError: another key than the coordinator's, a site-level report that is missing or not wanted,
            or a result that contradicts itself; nothing was written.
        ServerError: the folder cannot be written to.
    """
    signed_by_coordinator(result.job, key.public_key())
    facts = Facts.of(result, writer=version("tg-tinker"), site_level_report=site_level_report)
    verifier = coordinator_key(key.public_key())
    report = document(facts, read_statements(facts), site_level_epsilon(facts), verifier)
    data = sign_report(report, key)
    if len(data) > MAX_BYTES:
        raise InvalidRequestError(
            f"the report would have {len(data) // 2**20} MiB, and nobody reads more than {MAX_BYTES // 2**20}",
            field="result",
            constraint=f"a report of at most {MAX_BYTES // 2**20} MiB",
        )
    verdicts = tuple(REGISTRY.verify(data, Trust(keys=[verifier])))
    page = render(report)
    written = WrittenReport(
        report=folder / REPORT_NAME,
        page=folder / PAGE_NAME,
        sentence=report["guarantee"]["sentence"],
        verifier_key=verifier.text,
        verdicts=verdicts,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(written.report, data)
        _replace(written.page, page.encode())
    except OSError as e:
        raise ServerError(f"cannot write to {folder}: {e.strerror}; name a writable folder") from e
    return written


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
