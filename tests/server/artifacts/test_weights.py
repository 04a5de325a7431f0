"""Weights out of an artifact and back, while they stream: the same numbers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.support.work import peak_bytes
from tg_tinker_server.artifacts.blobs import LocalBlobs
from tg_tinker_server.artifacts.tensors import FormatError, parse, serialize
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.artifacts.weights import engine_name, public_name, put_weights, take_weights
from tg_tinker_server.crypto.envelope import TenantKeyring

STATE = {"step": 3}
RNG = np.random.default_rng(4)
TENSORS = {
    "weights/base_model.model.a.lora_A.weight": RNG.standard_normal((3, 5), np.float32),
    "optimizer/base_model.model.a.lora_A.weight/exp_avg": RNG.standard_normal((3, 5), np.float32),
    "weights/base_model.model.a.lora_B.weight": RNG.standard_normal((5, 3)),
    "weights/base_model.model.lm_head.modules_to_save.weight": RNG.standard_normal((2, 2)).astype(np.float16),
    "optimizer/z/step": np.array(3.0),
}


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_weights_come_out_under_pefts_names_whatever_the_pieces(size: int) -> None:
    plain = b"".join(serialize(TENSORS, STATE))
    taken = take_weights(cut(plain, size), len(plain))
    data = b"".join(bytes(p) for p in taken.pieces)
    assert len(data) == taken.size
    found = safetensors.numpy.load(data)
    assert sorted(found) == [
        "base_model.model.a.lora_A.weight",
        "base_model.model.a.lora_B.weight",
        "base_model.model.lm_head.weight",
    ]
    for name, array in found.items():
        source = name.replace("lm_head.", "lm_head.modules_to_save.")
        np.testing.assert_array_equal(array, TENSORS["weights/" + source])


@pytest.mark.parametrize("size", [1, 13, 10**6])
def test_what_went_out_comes_in_again(size: int) -> None:
    plain = b"".join(serialize(TENSORS, STATE))
    data = b"".join(bytes(p) for p in take_weights([plain], len(plain)).pieces)
    artifact = b"".join(bytes(p) for p in put_weights(cut(data, size), len(data), {"step": 9}, ["lm_head"]))
    tensors, state = parse(memoryview(artifact))
    assert state == {"step": 9}
    assert tensors.keys() == {n for n in TENSORS if n.startswith("weights/")}
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, TENSORS[name])


def test_names_of_modules_trained_whole_translate_both_ways() -> None:
    for name, modules in (
        ("base_model.model.lm_head.modules_to_save.weight", ["lm_head"]),
        ("base_model.model.model.norm.modules_to_save.weight", ["norm"]),
        ("base_model.model.score.modules_to_save.dense.bias", ["score"]),
        ("base_model.model.a.lora_A.weight", ["lm_head"]),
        ("table", []),
    ):
        assert engine_name(public_name(name), modules) == name


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04pickle...", (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}"],
    ids=["nothing", "a pickle", "a huge header", "no metadata"],
)
def test_what_is_no_file_of_weights_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        b"".join(bytes(p) for p in put_weights([data], len(data), STATE, []))


def test_metadata_of_others_is_refused() -> None:
    array = np.zeros(2, np.float32)
    foreign = safetensors.numpy.save({"a": array}, metadata={"format": "pt", "more": "x"})
    with pytest.raises(FormatError, match="metadata"):
        b"".join(bytes(p) for p in put_weights([foreign], len(foreign), STATE, []))


def test_memory_does_not_grow_with_the_size(tmp_path: Path, keys: TenantKeyring) -> None:
    vault = Vault(LocalBlobs(tmp_path), keys)
    peaks = []
    for megabytes in (4, 32):
        name = f"ckpt_{megabytes:08x}"
        tensors = {"weights/x": np.zeros(megabytes * 2**18, np.float32), "optimizer/x/m": np.zeros(9, np.float32)}
        vault.seal(tenant="t", artifact_id=name, kind="checkpoint", tensors=tensors, state=STATE)
        del tensors

        def copy(name: str = name) -> None:
            size, pieces = vault.plaintext(tenant="t", artifact_id=name, kind="checkpoint")
            taken = take_weights(pieces, size)
            again = put_weights(taken.pieces, taken.size, STATE, [])
            vault.seal_plain(tenant="t", artifact_id=name + "00", kind="checkpoint", plaintext=again)

        peaks.append(peak_bytes(copy))
    assert peaks[1] < peaks[0] + 2**20
    assert peaks[1] < 12 * 2**20
