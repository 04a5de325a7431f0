"""Every kind of signed document that this package can check.

To add one, register its check with :data:`~tg_tinker.reports.verdicts.REGISTRY` and import its module here.
Federation reports are of a package above this one: importing ``tg_tinker.federated.report_verify`` adds them.
"""

from __future__ import annotations

from collections.abc import Iterator

from tg_tinker.reports import exported as _exported  # noqa: F401 - registers its type
from tg_tinker.reports import verify as _report  # noqa: F401 - registers its type
from tg_tinker.reports.verdicts import REGISTRY, Trust, Verdict


def verify_document(data: bytes, trust: Trust) -> Iterator[Verdict]:
    """Check a signed document to the end; each step is yielded once it passed.

    Raises:
        InvalidRequestError: the first check that failed, in ``details["check"]``, and why.
    """
    return REGISTRY.verify(data, trust)
