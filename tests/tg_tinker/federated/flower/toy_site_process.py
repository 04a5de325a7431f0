"""A site of its own process: ``toy_site_process.py FOLDER NAME COORDINATOR_PUBLIC_KEY``. Its state is the folder."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.tg_tinker.federated.flower.toy import ToySite
from tg_tinker.federated.flower.apps import client_app
from tg_tinker.federated.flower.supernode import serve
from tg_tinker.federated.flower_settings import FlowerSite
from tg_tinker.federated.keys import load_identity, public_key

if __name__ == "__main__":
    folder, name, coordinator = Path(sys.argv[1]), sys.argv[2], public_key(sys.argv[3])
    settings = FlowerSite.model_validate_json((folder / "site.json").read_text(encoding="utf-8"))
    site = ToySite(name, coordinator, key=load_identity(folder / "identity.key"))
    serve(settings, client_app(site), tell=lambda text: print(text, flush=True))
