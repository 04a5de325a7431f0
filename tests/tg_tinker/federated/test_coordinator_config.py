"""coordinator.toml: what it may say, and what is said about what it may not."""

from __future__ import annotations

import pytest

from tests.tg_tinker.federated.jobs import key_of
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.keys import make_identity, public_text

TEXT = """
server = "127.0.0.1:50051"
api_key_file = "api.key"
identity = "coordinator.key"
state_dir = "state"
max_update_norm = 10

[job]
job_id = "icd10"
base_model = "bigram"
rounds = 2
batch_size = 4
min_sites = 2
expires = 2100-01-01T00:00:00Z
optimizer = {{ name = "sgd", learning_rate = 0.5 }}
roster = {{ north = "keys/north.pub", south = "{south}" }}
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "north.pub").write_text(public_text(key_of("north")) + "\n")
    path = tmp_path / "coordinator.toml"
    path.write_text(TEXT.format(south=public_text(key_of("south"))))
    return path


def test_a_file_is_read_with_its_paths_and_keys(file):
    config = CoordinatorConfig.load(file)
    make_identity(config.identity)
    key = config.key()
    job = config.job_with(coordinator=key, adapter_digest="1" * 64)
    assert config.state_dir == file.parent / "state"
    assert job.roster == {name: public_text(key_of(name)) for name in ("north", "south")}
    assert (job.coordinator, job.adapter_digest) == (public_text(key), "1" * 64)
    assert job.optimizer.learning_rate == 0.5
    assert config.is_of(job, key)
    assert not config.is_of(job.model_copy(update={"rounds": 3}), key)
    assert not config.is_of(job, key_of("another"))


def test_the_api_key_comes_from_a_private_file_or_the_environment(file):
    config = CoordinatorConfig.load(file)
    secret = file.parent / "api.key"
    secret.write_text("tgk_a_b\n")
    with pytest.raises(InvalidRequestError, match="chmod 600"):
        config.service()
    secret.chmod(0o600)
    config.service().close()
    other = config.model_copy(update={"api_key_file": None, "api_key_env": "SOME_KEY"})
    with pytest.raises(InvalidRequestError, match="SOME_KEY"):
        other.service({})
    other.service({"SOME_KEY": "tgk_a_b"}).close()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("max_update_norm", "max_update_nrom", "max_update_nrom"),
        ("rounds = 2", "rounds = 0", "rounds"),
        ("rounds = 2", "rounds = 2\nadapter_digest = 'x'", "adapter_digest is filled in"),
        ("rounds = 2", "rounds = 2\nturns = 2", "turns"),
        ("min_sites = 2", "min_sites = 3", "min_sites 3"),
        ("keys/north.pub", "keys/nroth.pub", "nroth.pub"),
        ('api_key_file = "api.key"\n', "", "api_key_file or api_key_env"),
        ("127.0.0.1:50051", "http://example.org:1", "example.org"),
        ("[job]", "[job", "TOML"),
        ("expires = 2100-01-01T00:00:00Z", "expires = 2100-01-01T00:00:00", "time zone"),
    ],
)
def test_what_cannot_be_is_refused_by_name(file, before, after, said):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    with pytest.raises(InvalidRequestError, match=said):
        CoordinatorConfig.load(file)


def test_a_missing_file_and_a_pasted_key_are_not_repeated(file):
    with pytest.raises(InvalidRequestError, match="cannot read"):
        CoordinatorConfig.load(file.parent / "no.toml")
    file.write_text(file.read_text().replace('"127.0.0.1:50051"', "['tgk_secret']"))
    with pytest.raises(InvalidRequestError) as e:
        CoordinatorConfig.load(file)
    assert "tgk_secret" not in e.value.message
