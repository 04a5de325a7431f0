"""An export is what its signer made, to the last bit, or it is refused."""

from __future__ import annotations

import base64
import io
import json
import random
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric import utils

from tests.support.exports import ARTIFACT, CLAIM, KEY, NAME, SIGNER, WEIGHTS, archive, files, source, with_manifest
from tg_tinker.errors import InvalidRequestError, LogVerificationError, TGTinkerError
from tg_tinker.exports.manifest import PAYLOAD_TYPE, Manifest, open_manifest
from tg_tinker.exports.model_signing import P256_ORDER
from tg_tinker.exports.reader import ExportReader
from tg_tinker.exports.tar import ADAPTER, BUNDLE, END, MANIFEST, ORDER, write_tar
from tg_tinker.transparency.note import VerifierKey
from tg_tinker_server.crypto.signing import Signer


def read(data: bytes, pieces_of: int = 700) -> ExportReader:
    reader = ExportReader((data[i : i + pieces_of] for i in range(0, len(data), pieces_of)), KEY)
    assert b"".join(reader.weights()) == WEIGHTS
    return reader


def test_an_honest_export_reads_back_however_it_is_cut() -> None:
    for pieces_of in (1, 511, 512, 513, 10**6):
        reader = read(archive(), pieces_of)
    assert reader.folder == ARTIFACT
    assert reader.weights_name == ADAPTER
    assert reader.manifest.predicate["artifact"]["step"] == 7
    assert reader.manifest.predicate["privacy"] is None
    assert "Trained without differential privacy" in reader.manifest.predicate["guarantee"]


def test_any_tar_unpacks_it() -> None:
    contents = files()
    with tarfile.open(fileobj=io.BytesIO(archive(contents))) as tar:
        found = {m.name: (tar.extractfile(m) or io.BytesIO()).read() for m in tar.getmembers()}
    assert found == {f"{ARTIFACT}/{name}": data for name, data in contents.items()}


def flips(data: bytes, positions: range | list[int], bits: range) -> list[tuple[int, int]]:
    accepted = []
    for position in positions:
        for bit in bits:
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            try:
                reader = ExportReader([bytes(changed)], KEY)
                for _ in reader.weights():
                    pass
            except TGTinkerError:
                continue
            accepted.append((position, bit))
    return accepted


def test_no_byte_of_the_manifest_can_be_changed() -> None:
    manifest = files()[MANIFEST]
    accepted = []
    for bit in range(0, 8 * len(manifest), 7):  # every byte, and every bit of a byte; all of them in the slow test
        changed = bytearray(manifest)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            accepted.append((bit, open_manifest(bytes(changed), KEY)))
        except TGTinkerError:
            continue
    assert accepted == []


def test_no_sampled_bit_of_the_archive_can_be_changed() -> None:
    data = archive()
    sample = random.Random(11).sample(range(len(data)), 1500)
    assert [p for p in sample if flips(data, [p], range(p % 8, p % 8 + 1))] == []


@pytest.mark.slow
def test_no_bit_at_all_of_the_archive_can_be_changed() -> None:
    data = archive()
    assert flips(data, range(len(data)), range(8)) == []


def test_an_archive_that_was_cut_or_continued_is_refused() -> None:
    data = archive()
    for bad in (data[:-1], data[:-512], data[:-1024], data[: len(data) // 2], b"", data + b"\0", data + bytes(512)):
        with pytest.raises(InvalidRequestError):
            read(bad)


@pytest.mark.parametrize("without", sorted(files()))
def test_a_file_cannot_be_left_out(without: str) -> None:
    contents = files()
    del contents[without]
    with pytest.raises(TGTinkerError):
        read(archive(contents))


def test_a_file_cannot_be_added_swapped_or_moved() -> None:
    contents = files()
    other = files(source(step=8))
    for name in contents:
        if contents[name] != other[name]:
            with pytest.raises(TGTinkerError):
                read(archive({**contents, name: other[name]}))
    with pytest.raises(TGTinkerError):
        read(archive({**contents, "report.json": b"{}"}))
    with pytest.raises(TGTinkerError, match="folder"):
        read(archive(contents, folder="ckpt_ffffffffffffffff"))


def test_files_stand_once_and_in_their_order() -> None:
    contents = files()
    names = sorted(contents, key=ORDER.__getitem__)
    blocks = {
        n: b"".join(bytes(p) for p in write_tar(ARTIFACT, [(n, len(contents[n]), [contents[n]])]))[:-1024]
        for n in names
    }
    read(b"".join(blocks[n] for n in names) + END)
    for i, name in enumerate(names[:-1]):
        twice = [*names[: i + 1], name, *names[i + 1 :]]
        swapped = [*names[:i], names[i + 1], name, *names[i + 2 :]]
        for order in (twice, swapped):
            with pytest.raises(InvalidRequestError, match="refused"):
                read(b"".join(blocks[n] for n in order) + END)


def raw_tar(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            content = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "data",
    [
        raw_tar((f"{ARTIFACT}/../../etc/passwd", b"x")),
        raw_tar(("/etc/passwd", b"x")),
        raw_tar((f"../{MANIFEST}", b"x")),
        raw_tar((f"{ARTIFACT}/pytorch_model.bin", b"\x80\x04x")),
        raw_tar((f"{ARTIFACT}/sub/{MANIFEST}", b"x")),
        raw_tar(special(f"{ARTIFACT}/{MANIFEST}", tarfile.SYMTYPE, "/etc/passwd")),
        raw_tar(special(f"{ARTIFACT}/{MANIFEST}", tarfile.LNKTYPE, "/etc/passwd")),
        raw_tar(special(ARTIFACT, tarfile.DIRTYPE)),
        raw_tar(special(f"{ARTIFACT}/{MANIFEST}", tarfile.FIFOTYPE)),
        b"\x80\x04\x95pickle" + bytes(600),
        b"PK\x03\x04" + bytes(2000),
    ],
)
def test_an_archive_that_no_server_wrote_is_refused_before_anything_of_it_is_used(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="refused"):
        ExportReader([data], KEY)


def test_a_file_larger_than_any_export_has_is_refused_by_its_header() -> None:
    info = tarfile.TarInfo(f"{ARTIFACT}/{MANIFEST}")
    info.size, info.mode = 2**30, 0o644
    with pytest.raises(InvalidRequestError, match="refused"):
        ExportReader([info.tobuf(tarfile.USTAR_FORMAT), b"x" * 1000], KEY)


def resigned(change: Callable[[dict[str, Any]], None], signer: Signer = SIGNER) -> dict[str, bytes]:
    """An export whose signer put another statement into its manifest, and signed all of it again."""
    contents = files()
    statement = json.loads(base64.b64decode(json.loads(contents[MANIFEST])["payload"]))
    change(statement)
    return with_manifest(contents, rfc8785.dumps(signer.sign_dsse(PAYLOAD_TYPE, rfc8785.dumps(statement))))


FRAUDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown field": lambda s: s.update(more=1),
    "an unknown claim": lambda s: s["predicate"].update(more=1),
    "a claim left out": lambda s: s["predicate"].pop("privacy"),
    "another type": lambda s: s.update(predicateType="urn:tg-tinker:export:v2"),
    "another statement": lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
    "another digest": lambda s: s["subject"][0]["digest"].update(sha256="00" * 32),
    "no digest": lambda s: s["subject"][0]["digest"].clear(),
    "a weaker digest": lambda s: s["subject"][0]["digest"].update(md5="00"),
    "a file twice": lambda s: s["subject"].append(s["subject"][0]),
    "a path": lambda s: s["subject"][0].update(name="../x"),
    "no files": lambda s: s["subject"].clear(),
    "files that are not there": lambda s: s["subject"].append(
        {"name": "report.json", "digest": {"sha256": "00" * 32}}
    ),
    "another origin": lambda s: s["predicate"].update(origin="tg-tinker/" + "0" * 32),
    "a layout of no file": lambda s: s["predicate"].update(layout="weights"),
    "an unknown layout": lambda s: s["predicate"].update(layout="pickle"),
    "a step that is no number": lambda s: s["predicate"]["artifact"].update(step="7"),
    "a negative epsilon": lambda s: s["predicate"].update(privacy={**CLAIM, "epsilon": "-1.0"}),
    "epsilon NaN": lambda s: s["predicate"].update(privacy={**CLAIM, "epsilon": "nan"}),
    "epsilon in another spelling": lambda s: s["predicate"].update(privacy={**CLAIM, "epsilon": "1.50"}),
    "epsilon as a number": lambda s: s["predicate"].update(privacy={**CLAIM, "epsilon": 1.5}),
    "delta 1": lambda s: s["predicate"].update(privacy={**CLAIM, "delta": "1.0"}),
    "a promise without a ledger": lambda s: s["predicate"].update(privacy={"epsilon": "1.0"}),
    "provenance of another form": lambda s: s["predicate"].update(provenance=["elsewhere"]),
    "provenance with a negative epsilon": lambda s: s["predicate"].update(
        provenance=[
            {
                "artifact": "a",
                "base_model": "b",
                "manifest": "",
                "origin": "o",
                "privacy": {**CLAIM, "epsilon": "-1.0"},
            }
        ]
    ),
}


@pytest.mark.parametrize("fraud", FRAUDS)
def test_a_signed_statement_of_another_shape_is_refused(fraud: str) -> None:
    read(archive(resigned(lambda statement: None)))
    with pytest.raises(TGTinkerError):
        read(archive(resigned(FRAUDS[fraud])))


def test_another_key_is_refused_and_so_is_a_second_signature() -> None:
    other = Signer(b"o" * 32)
    with pytest.raises(LogVerificationError, match="no signature of"):
        read(archive(files(signer=other)))
    contents = files()
    envelope = json.loads(contents[MANIFEST])
    envelope["signatures"] += json.loads(files(signer=other)[MANIFEST])["signatures"]
    with pytest.raises(TGTinkerError):
        read(archive(with_manifest(contents, rfc8785.dumps(envelope))))


def test_a_manifest_in_another_spelling_is_refused() -> None:
    contents = files()
    spaced = json.dumps(json.loads(contents[MANIFEST])).encode()
    for bad in (spaced, contents[MANIFEST] + b"\n", b"[" * 5000, b"NaN", b"{}", b"", b"1" * 5000):
        with pytest.raises(TGTinkerError):
            open_manifest(bad, KEY)


def test_the_key_is_looked_up_by_the_origin_that_is_claimed() -> None:
    asked: list[str] = []

    def trust(origin: str) -> VerifierKey:
        asked.append(origin)
        return KEY

    ExportReader([archive()], trust)
    assert asked == [KEY.name]


def test_the_bundle_is_checked_besides() -> None:
    contents = files()
    bundle = json.loads(contents[BUNDLE])
    signature = bytearray(base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"]))
    signature[-1] ^= 1
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    with pytest.raises(InvalidRequestError, match=r"model\.sig"):
        read(archive({**contents, BUNDLE: rfc8785.dumps(bundle)}))
    r, s = utils.decode_dss_signature(bytes(signature[:-1]) + bytes([signature[-1] ^ 1]))
    mirrored = utils.encode_dss_signature(r, P256_ORDER - s)  # it verifies, and is not what the signer wrote
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(mirrored).decode()
    with pytest.raises(InvalidRequestError, match=r"model\.sig"):
        read(archive({**contents, BUNDLE: rfc8785.dumps(bundle)}))
    elsewhere = files(source(step=9))[BUNDLE]
    with pytest.raises(InvalidRequestError, match="not over these files"):
        read(archive({**contents, BUNDLE: elsewhere}))


def test_what_was_promised_reads_back_as_a_number() -> None:
    contents = files(source(ledger=CLAIM))
    manifest: Manifest = open_manifest(contents[MANIFEST], KEY)
    assert manifest.epsilon == 1.5
    assert "exp(1.500)" in manifest.predicate["guarantee"]
    assert NAME.encode() in WEIGHTS
