"""A site's configuration: one TOML file, read once, unknown keys refused.

    site = "north"                        # its name on the job's roster
    server = "127.0.0.1:50051"            # its own tg-tinker server
    api_key_file = "north.api-key"        # or api_key_env = "NORTH_API_KEY"; roles trainer, exporter and auditor
    dataset = "icd10"                     # registered there with service.create_dataset
    identity = "north.key"                # made by `tg-tinker federated keygen`
    state_dir = "north-state"             # what it remembers between messages

    [policy]                              # what it agrees to: policy.py
    coordinator = "base64 of its public key"
    base_models = ["tiny-llama-2m"]

    [flower]                              # how it reaches the coordinator: flower_settings.FlowerSite

Paths are relative to the file's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from tg_tinker.federated.flower_settings import FlowerSite
from tg_tinker.federated.job import SiteName
from tg_tinker.federated.link import Handler
from tg_tinker.federated.party_config import PartyConfig
from tg_tinker.federated.policy import SitePolicy

ENVIRONMENT = "TG_TINKER_SITE_CONFIG"
"""Names the file for `handler_from_environment`."""


class SiteConfig(PartyConfig):
    """What a site is told, besides what every party is: its name, its data, and what it agrees to.

    Attributes:
        site: name on the job's roster.
        dataset: of the site's own server.
        flower: how it reaches the coordinator.
    """

    FILE: ClassVar[str] = "site.toml"

    site: SiteName
    dataset: str = Field(min_length=1, max_length=200)
    policy: SitePolicy
    flower: FlowerSite | None = None


def handler_from_environment(environ: Mapping[str, str] = os.environ) -> Handler:
    """The handler of the site whose configuration the variable ``TG_TINKER_SITE_CONFIG`` names.

    Raises:
        InvalidRequestError: the variable is not set, or the configuration cannot be used.
    """
    from tg_tinker.federated.site import Site

    path = environ.get(ENVIRONMENT)
    if not path:
        raise SiteConfig.wrong(f"set {ENVIRONMENT} to the path of the site's configuration (site.toml)", "a path")
    config = SiteConfig.load(path)
    return Site(config, config.service(environ), config.key()).handle
