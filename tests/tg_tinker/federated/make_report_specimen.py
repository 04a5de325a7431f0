"""Makes the specimens of the federation report anew: ``python -m tests.tg_tinker.federated.make_report_specimen``.

Only until version 1 is released; from then on the files stand for what was promised, and are never written again.
"""

from __future__ import annotations

from pathlib import Path

from tests.tg_tinker.federated.reported import COORDINATOR, MASKING, honest, population, site_report, uneven
from tg_tinker.federated.keys import public_text

SPECIMEN = Path(__file__).parents[2] / "compat" / "federation-report-v1"


def make(folder: Path) -> None:
    """A job that some sites left or did not state, and the whole report of one; a masked one; one of many sites."""
    folder.mkdir(exist_ok=True)
    (folder / "records.json").write_bytes(uneven().sign())
    (folder / "records-site-0.json").write_bytes(site_report("site-0", 6))
    (folder / "masked.json").write_bytes(honest(masking=MASKING).sign())
    (folder / "sites.json").write_bytes(population().sign())
    (folder / "coordinator.pub").write_text(public_text(COORDINATOR.public_key()) + "\n")


if __name__ == "__main__":
    make(SPECIMEN)
