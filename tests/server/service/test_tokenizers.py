"""A client gets the tokenizer of a base model, and nothing else of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.rpc.raw_client import RawClient
from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker_server.app import EmbeddedServer, model_sources
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service.tokenizers import Tokenizers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_bytes(name.encode() * 200_000)
    for name in ("config.json", "model.safetensors", "tokenizer.json.bak", ".env"):
        (folder / name).write_text("not for clients")
    return folder


def joined(tokenizers: Tokenizers, name: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for file, piece in tokenizers.files(name):
        assert len(piece) <= 1 << 20
        files[file] = files.get(file, b"") + piece
    return files


def test_a_caller_on_this_machine_can_be_told_the_folder(folder: Path, tmp_path: Path) -> None:
    tokenizers = Tokenizers({"org/model": folder, "bare": tmp_path, "hub": "org/elsewhere"})
    assert tokenizers.folder_of("org/model") == folder.resolve()
    assert [tokenizers.folder_of(name) for name in ("bare", "hub", "unknown")] == [None] * 3


def test_only_the_files_of_a_tokenizer_are_shown(folder: Path) -> None:
    files = joined(Tokenizers({"org/model": folder}), "org/model")
    assert files == {name: name.encode() * 200_000 for name in ("tokenizer.json", "chat_template.jinja")}


def test_the_id_is_the_hubs_or_the_models_own(folder: Path) -> None:
    tokenizers = Tokenizers({"org/model": str(folder), "short": "org/on-the-hub"})
    assert tokenizers.id_of("org/model") == "org/model"
    assert tokenizers.id_of("short") == "org/on-the-hub"
    assert tokenizers.id_of("other") == ""


@pytest.mark.parametrize("name", ["short", "other", "..", "../model", ""])
def test_what_is_not_on_disk_is_not_found(folder: Path, name: str) -> None:
    with pytest.raises(ResourceNotFoundError) as caught:
        Tokenizers({"org/model": folder, "short": "org/on-the-hub"}).files(name)
    assert ("org/on-the-hub" in caught.value.message) == (name == "short")


def test_the_bundled_models_tokenizer_comes_over_the_wire_and_works(
    bigram_server: EmbeddedServer, tmp_path: Path
) -> None:
    client = RawClient(bigram_server.address, bigram_server.mint_key())
    with pytest.raises(ResourceNotFoundError):  # the NumPy model has none
        client.send(runs_pb2.GetTokenizerRequest(base_model="bigram"))
    config = ServerConfig(data_dir=tmp_path, models={"mine": str(tmp_path)})
    sources = model_sources(config)
    assert sources["mine"] == str(tmp_path)
    files = joined(Tokenizers(sources), "tiny-llama-2m")
    folder = tmp_path / "got"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    from transformers import AutoTokenizer

    got, there = (AutoTokenizer.from_pretrained(f) for f in (folder, sources["tiny-llama-2m"]))
    assert got.encode("Once upon a time") == there.encode("Once upon a time")
