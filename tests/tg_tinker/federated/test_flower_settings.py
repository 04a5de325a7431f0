"""What a site and the coordinator are told about Flower."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tg_tinker.federated.flower_settings import FlowerCoordinator, FlowerSite, split_address

SITE = {"superlink": "link.example.org:8000", "root_certificates": "ca.crt", "node_key": "node.key"}
COORDINATOR = {
    "ca": "ca.crt",
    "certificate": "s.pem",
    "key": "s.key",
    "node_keys": {"north": "n.pub", "south": "/k/s.pub"},
}


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:1", "localhost", 1),
        ("link.example.org:8000", "link.example.org", 8000),
        ("0.0.0.0:65535", "0.0.0.0", 65535),
        ("[::]:8000", "::", 8000),
        ("[2001:DB8::0:1]:80", "2001:db8::1", 80),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        ":8000",
        "localhost:",
        "localhost:0",
        "localhost:65536",
        "localhost:x",
        "localhost:٣",
        "::1:80",
        "[::1]",
        "[x]:80",
        "https://a:80",
        "a b:80",
        "--insecure:80",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        FlowerSite.model_validate({**SITE, "superlink": text})
    with pytest.raises(ValidationError):
        FlowerCoordinator.model_validate({**COORDINATOR, "address": text})


def test_relative_paths_are_taken_from_the_folder_of_the_file() -> None:
    folder = Path("/etc/tg")
    site = FlowerSite.model_validate(SITE).under(folder)
    assert (site.root_certificates, site.node_key, site.state_dir) == (
        folder / "ca.crt",
        folder / "node.key",
        folder / "flower",
    )
    coordinator = FlowerCoordinator.model_validate(COORDINATOR).under(folder)
    assert coordinator.node_keys == {"north": folder / "n.pub", "south": Path("/k/s.pub")}
    assert (coordinator.ca, coordinator.certificate, coordinator.key) == (
        folder / "ca.crt",
        folder / "s.pem",
        folder / "s.key",
    )
    assert coordinator.address == "127.0.0.1:8000"


def test_a_supernode_of_somebody_else_is_on_this_computer_and_has_a_secret() -> None:
    good = FlowerSite.model_validate({**SITE, "supernode": "127.0.0.1:9094", "tasks_secret": "s"}).under(Path("/etc"))
    assert good.tasks_secret == Path("/etc/s")
    assert FlowerSite.model_validate(SITE).under(Path("/etc")).tasks_secret is None
    for wrong in (
        {"supernode": "127.0.0.1:1"},
        {"tasks_secret": "s"},
        {"supernode": "10.0.0.1:1", "tasks_secret": "s"},
    ):
        with pytest.raises(ValidationError, match=r"belong together|not on this computer"):
            FlowerSite.model_validate({**SITE, **wrong})


def test_unknown_settings_and_missing_sites_are_refused() -> None:
    for model, good in ((FlowerSite, SITE), (FlowerCoordinator, COORDINATOR)):
        with pytest.raises(ValidationError):
            model.model_validate({**good, "insecure": True})
    with pytest.raises(ValidationError):
        FlowerCoordinator.model_validate({**COORDINATOR, "node_keys": {}})
