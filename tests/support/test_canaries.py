"""The search finds a marker however it was written down, wherever it lies, and nothing else."""

from __future__ import annotations

import base64
import json
import os

import numpy as np
import pytest

from tests.support.canaries import BLOCK, Searcher, markers

MARKERS = markers(1000, seed=1)
SEARCHER = Searcher(MARKERS)
IDS = np.frombuffer(MARKERS[7].encode(), np.uint8)

WRITTEN = {
    "utf-8": MARKERS[7].encode(),
    "utf-16 little": MARKERS[7].encode("utf-16-le"),
    "utf-16 big": MARKERS[7].encode("utf-16-be"),
    "utf-32": MARKERS[7].encode("utf-32-le"),
    "int16": IDS.astype("<i2").tobytes(),
    "int32": IDS.astype("<i4").tobytes(),
    "int32 big": IDS.astype(">i4").tobytes(),
    "int64": IDS.astype("<i8").tobytes(),
    "int64 big": IDS.astype(">i8").tobytes(),
    "json text": json.dumps({"text": f'é "{MARKERS[7]}"\n'}).encode(),
    "json list": json.dumps({"ids": IDS.tolist()}).encode(),
    "compact json list": json.dumps(IDS.tolist(), separators=(",", ":")).encode(),
    "list of strings": " ".join(map(str, IDS)).encode(),
    "hex": MARKERS[7].encode().hex().encode(),
    "hex upper": MARKERS[7].encode().hex().upper().encode(),
    "first half": MARKERS[7][:14].encode(),
    "second half": MARKERS[7][14:].encode(),
}
WRITTEN |= {f"base64 after {n}": base64.b64encode(b"x" * n + MARKERS[7].encode() + b"yz") for n in range(4)}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("before", [0, 3])
def test_a_marker_is_found_however_it_is_written(written: str, before: int) -> None:
    data = os.urandom(before) + WRITTEN[written] + os.urandom(50)
    assert {marker for _, marker in SEARCHER.search(data)} == {MARKERS[7]}


def test_every_marker_is_found_among_all() -> None:
    assert {marker for _, marker in SEARCHER.search("".join(MARKERS).encode())} == set(MARKERS)


def test_a_marker_is_found_across_the_seam_of_two_blocks() -> None:
    for shift in (-25, -12, -9, -8, -7, -3, -1, 0):
        data = b"." * (BLOCK + shift) + MARKERS[3][:10].encode() + b"." * 40
        assert {marker for _, marker in SEARCHER.search(data)} == {MARKERS[3]}


def test_nothing_is_found_in_noise_or_in_little() -> None:
    for data in (b"", b"1234567", os.urandom(BLOCK), " ".join(map(str, os.urandom(50_000))).encode()):
        assert SEARCHER.search(data) == set()
