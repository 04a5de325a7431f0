"""Measures the encryption of artifacts in gigabytes per CPU-second: `python benchmarks/artifacts.py`.

Each line encrypts 2 GiB; CPU time is that of the whole process, system calls included. The plaintext is in memory,
the ciphertext goes where the line says.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyrage

from tg_tinker.exports.age import seal_age
from tg_tinker.exports.hpke import Identity, seal_hpke
from tg_tinker.streaming import Bytes, encrypt_segments
from tg_tinker_server.artifacts.blobs import LocalBlobs
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.crypto.key_rows import MemoryKeyRows
from tg_tinker_server.crypto.keys import LocalKeyProvider

TENSOR = np.random.default_rng(0).standard_normal(2**26, np.float32)
TENSOR_BYTES = TENSOR.nbytes
REPEATS = 8
KEY = bytes(32)
NAME = "ck_00000000"


class NullBlobs(LocalBlobs):
    """A store that writes to /dev/null."""

    def put(self, name: str, pieces: Iterable[Bytes], *, replace: bool = False) -> None:  # noqa: ARG002 - the store's signature
        """Write the pieces away."""
        with Path(os.devnull).open("wb", buffering=0) as sink:
            for piece in pieces:
                sink.write(piece)


def report(what: str, work: Callable[[], object]) -> None:
    """Run ``work``, which handles one tensor, and print its rate."""
    work()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    for _ in range(REPEATS):
        work()
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    gigabytes = REPEATS * TENSOR_BYTES / 1e9
    print(f"{what:58} {gigabytes / cpu_s:6.2f} GB/CPU-s {gigabytes / wall_s:6.2f} GB/s")


def write(pieces: Iterable[Bytes]) -> None:
    """To /dev/null."""
    with Path(os.devnull).open("wb", buffering=0) as sink:
        for piece in pieces:
            sink.write(piece)


def hashed(pieces: Iterable[Bytes]) -> None:
    """To SHA-256 and nowhere else."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    digest.hexdigest()


def sealed_for_age(recipient: str, pieces: Iterable[Bytes]) -> None:
    """To /dev/null, through pyrage."""
    with Path(os.devnull).open("wb", buffering=0) as sink:
        seal_age([recipient], pieces, sink)


def main() -> None:
    """Print one line for each measurement."""
    plain = memoryview(TENSOR.view(np.uint8).data)
    keys = TenantKeyring(LocalKeyProvider(KEY), MemoryKeyRows())
    with tempfile.TemporaryDirectory() as folder:
        local, null = LocalBlobs(Path(folder)), NullBlobs(Path(folder))
        vault = Vault(local, keys)
        tensors = {"x": TENSOR}

        def seal_and_delete() -> None:
            vault.delete(tenant="t", artifact_id=NAME)
            vault.seal(tenant="t", artifact_id=NAME, kind="state", tensors=tensors, state={})

        report("SHA-256 alone", lambda: hashlib.sha256(plain).digest())
        report("encrypt to /dev/null", lambda: write(encrypt_segments(KEY, b"", [plain])))
        report("encrypt and SHA-256", lambda: hashed(encrypt_segments(KEY, b"", [plain])))
        report(
            "Vault.seal to /dev/null (safetensors, encrypt, SHA-256)",
            lambda: Vault(null, keys).seal(tenant="t", artifact_id=NAME, kind="state", tensors=tensors, state={}),
        )
        report("Vault.seal to a durable file", seal_and_delete)
        report("Vault.verify from a file", lambda: vault.verify(tenant="t", artifact_id=NAME, kind="state"))
        report("Vault.open from a file", lambda: vault.open(tenant="t", artifact_id=NAME, kind="state"))
        archive = [plain[i : i + 2**20] for i in range(0, len(plain), 2**20)]
        age_key = str(pyrage.x25519.Identity.generate().to_public())
        pq_key = Identity(KEY).recipient.text
        report("an export's age seal to /dev/null", lambda: sealed_for_age(age_key, archive))
        report("an export's post-quantum seal to /dev/null", lambda: write(seal_hpke([pq_key], archive)))


if __name__ == "__main__":
    main()
