"""site.toml: every key known, paths beside the file, the API key never shown."""

from __future__ import annotations

import pytest

from tests.tg_tinker.federated.jobs import key_of
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated import site_config
from tg_tinker.federated.keys import make_identity, public_text, write_secret
from tg_tinker.federated.messages import Envelope
from tg_tinker.federated.site_config import ENVIRONMENT, SiteConfig, handler_from_environment

COORDINATOR = public_text(key_of("coordinator"))
HEAD = """
site = "north"
server = "127.0.0.1:1"
dataset = "icd10"
identity = "north.key"
state_dir = "state"
"""
POLICY = f"""
[policy]
coordinator = "{COORDINATOR}"
base_models = ["tiny"]
max_record_tokens = 64
"""


def write(folder, text):
    path = folder / "site.toml"
    path.write_text(text)
    return path


def test_a_configuration_is_read_with_paths_beside_it(tmp_path):
    path = write(tmp_path, HEAD + 'api_key_file = "/etc/key"\n' + POLICY + "max_epsilon = 2\njobs = ['icd']\n")
    config = SiteConfig.load(path)
    assert (config.site, config.server, config.dataset) == ("north", "127.0.0.1:1", "icd10")
    assert config.identity == tmp_path / "north.key"
    assert config.state_dir == tmp_path / "state"
    assert str(config.api_key_file) == "/etc/key"
    assert config.policy.max_epsilon == 2.0
    assert config.policy.jobs == ("icd",)
    assert config.flower is None


def test_flowers_table_has_paths_beside_the_file_too(tmp_path):
    flower = '[flower]\nsuperlink = "localhost:8000"\nroot_certificates = "ca.crt"\nnode_key = "/keys/node"\n'
    config = SiteConfig.load(write(tmp_path, HEAD + 'api_key_env = "K"\n' + POLICY + flower))
    assert config.flower.root_certificates == tmp_path / "ca.crt"
    assert str(config.flower.node_key) == "/keys/node"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (HEAD + POLICY, "api_key_file or api_key_env"),
        (HEAD + 'api_key_file = "a"\napi_key_env = "B"\n' + POLICY, "api_key_file or api_key_env"),
        (HEAD + 'api_key_env = "K"\nsurprise = 1\n' + POLICY, "surprise"),
        (HEAD + 'api_key_env = "K"\n' + POLICY + "max_espilon = 3\n", "policy.max_espilon"),
        (HEAD + 'api_key_env = "K"\n', "policy"),
        (HEAD.replace('"north"', '"No Name"') + 'api_key_env = "K"\n' + POLICY, "site"),
        (HEAD.replace("127.0.0.1:1", "hospital.example:1") + 'api_key_env = "K"\n' + POLICY, "unencrypted"),
        ("site = ", "not TOML"),
    ],
)
def test_what_cannot_be_is_refused_and_named(tmp_path, text, named):
    with pytest.raises(InvalidRequestError, match=named):
        SiteConfig.load(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="No such file"):
        SiteConfig.load(tmp_path / "none.toml")


def test_a_key_that_was_pasted_into_the_file_is_not_repeated(tmp_path):
    with pytest.raises(InvalidRequestError) as caught:
        SiteConfig.load(write(tmp_path, HEAD + 'api_key = "tgk_secret"\napi_key_env = "tgk secret"\n' + POLICY))
    assert "secret" not in str(caught.value)


def test_the_api_key_comes_from_a_file_that_only_its_owner_reads(tmp_path):
    config = SiteConfig.load(write(tmp_path, HEAD + 'api_key_file = "api"\n' + POLICY))
    with pytest.raises(InvalidRequestError, match="api"):
        config.service({})
    write_secret(tmp_path / "api", b"tgk_secret\n")
    service = config.service({})
    assert service.config.api_key == "tgk_secret"
    assert "secret" not in repr(service.config) + repr(config)
    (tmp_path / "api").chmod(0o644)
    with pytest.raises(InvalidRequestError, match="chmod 600"):
        config.service({})


def test_the_api_key_comes_from_the_environment(tmp_path):
    config = SiteConfig.load(write(tmp_path, HEAD + 'api_key_env = "NORTH_KEY"\n' + POLICY))
    assert config.service({"NORTH_KEY": " tgk_secret "}).config.api_key == "tgk_secret"
    for environ in ({}, {"NORTH_KEY": " "}):
        with pytest.raises(InvalidRequestError, match="NORTH_KEY"):
            config.service(environ)


def test_the_handler_is_that_of_the_configuration_in_the_environment(tmp_path):
    path = write(tmp_path, HEAD + 'api_key_env = "NORTH_KEY"\n' + POLICY)
    environ = {ENVIRONMENT: str(path), "NORTH_KEY": "tgk_x"}
    with pytest.raises(InvalidRequestError, match=r"north\.key"):
        handler_from_environment(environ)
    key = make_identity(tmp_path / "north.key")
    handle = handler_from_environment(environ)
    reply = handle(
        Envelope(kind="finish", direction="request", job="0" * 64, site="north").signed(key_of("coordinator"))
    )
    reply.verify(key.public_key())
    assert reply.facts["refused"] == "policy"
    with pytest.raises(InvalidRequestError, match=ENVIRONMENT):
        handler_from_environment({})
    assert site_config.ENVIRONMENT == "TG_TINKER_SITE_CONFIG"
