"""A checkpoint's way to a partner and into another server, over real servers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyrage
import pytest
import rfc8785
import safetensors.numpy
from click.testing import CliRunner

from tests.support.exports import CLAIM, SIGNER, WEIGHTS, archive, source
from tests.support.exports import files as specimen
from tg_tinker import BatchData, DPConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.cli import main
from tg_tinker.errors import (
    AuthorizationError,
    DPUnsupportedError,
    InvalidRequestError,
    LogVerificationError,
    ResourceNotFoundError,
    TGTinkerError,
)
from tg_tinker.exports import files, hpke
from tg_tinker.exports.manifest import PAYLOAD_TYPE
from tg_tinker.exports.model_signing import make_bundle
from tg_tinker.exports.tar import BUNDLE, MANIFEST, ORDER, write_tar
from tg_tinker.tensor_file import WEIGHTS_METADATA, header_bytes
from tg_tinker.transparency.note import VerifierKey
from tg_tinker.wire import requests
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto.signing import Signer, TenantSigner
from tg_tinker_server.ledger.audit import AuditLog

PUBLIC = TrainingConfig(model_ref="bigram", batch_size=4, seed=1, metadata={"note": "for us alone"})
IDENTITY = pyrage.x25519.Identity.generate()
RECIPIENT = str(IDENTITY.to_public())


def private(dataset_id: str, **more: Any) -> TrainingConfig:
    dp = DPConfig(dataset_id=dataset_id, target_epsilon=100.0, noise_multiplier=2.0, **more)
    return PUBLIC.model_copy(update={"dp_config": dp})


class Site:
    """One server with one tenant."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.closed = folder, False
        self.server = EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=folder)).start()
        self.service = ServiceClient(self.server.mint_key(), self.server.address)

    @property
    def signer(self) -> Signer:
        return TenantSigner(self.server._foundation.keyring).signer("default")

    @property
    def key(self) -> str:
        return self.signer.verifier_key

    def trained(self, config: TrainingConfig, steps: int = 2, start: str | None = None) -> TrainingClient:
        client = self.service.create_training_client(config, checkpoint_id=start)
        for seed in range(steps):
            ids = np.random.default_rng(seed).integers(1, 200, (4, 12))
            client.forward_backward(BatchData(input_ids=ids)).result()
            client.optim_step().result()
        return client

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.service.close()
            self.server.stop(grace_s=5.0)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    here, there = Site(tmp_path / "here"), Site(tmp_path / "there")
    yield here, there
    here.close()
    there.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "here")
    yield made
    made.close()


def unpacked(path: Path, site: Site, out: Path) -> Path:
    files.unpack(path, VerifierKey.parse(site.key), out, [str(IDENTITY)])
    return out


def test_a_partner_gets_the_weights_and_nothing_else(site: Site, tmp_path: Path) -> None:
    client = site.trained(private("data"))
    client.forward_backward(BatchData(input_ids=np.full((4, 12), 7))).result()  # pending, and not to be seen
    saved = client.save_state(metadata={"secret": "in metadata"}, name="zebra-finch")
    written = site.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "export.age")
    assert written.digest == "sha256:" + hashlib.sha256(written.path.read_bytes()).hexdigest()
    folder = unpacked(written.path, site, tmp_path / "out")
    opened = site.server._foundation.vault.open(tenant="default", artifact_id=saved.artifact_id, kind="checkpoint")
    weights = {n.removeprefix("weights/"): a for n, a in opened.tensors.items() if n.startswith("weights/")}
    assert any(n.startswith("optimizer/") for n in opened.tensors)
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)
    everything = b"".join(p.read_bytes() for p in folder.iterdir())
    for secret in (b"in metadata", b"zebra-finch", b"for us alone", b"optimizer/"):
        assert secret not in everything


def test_the_audit_log_has_receivers_and_digest_before_the_export_arrives(site: Site, tmp_path: Path) -> None:
    saved = site.trained(PUBLIC).save_state()
    written = site.service.export_artifact(saved.artifact_id, [RECIPIENT], tmp_path / "export.age")
    (entry,) = site.service.get_audit_logs(operation="export_artifact")
    assert entry.artifact_ids == [saved.artifact_id]
    assert entry.facts == {
        "digest": written.digest,
        "recipients": "sha256:" + hashlib.sha256(RECIPIENT.encode()).hexdigest(),
    }
    assert entry.actor in site.service.config.api_key


def test_an_export_that_cannot_be_noted_does_not_leave(site: Site, tmp_path: Path, monkeypatch: Any) -> None:
    saved = site.trained(PUBLIC).save_state()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(AuditLog, "append", full)
    with pytest.raises(TGTinkerError):
        site.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "export.age")
    assert list(tmp_path.glob("*export*")) == []


def test_without_privacy_the_export_says_that_nothing_is_promised(site: Site, tmp_path: Path) -> None:
    saved = site.trained(PUBLIC).save_state()
    site.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    folder = unpacked(tmp_path / "e.age", site, tmp_path / "out")
    assert not (folder / "report.json").exists()
    assert "nothing is promised" in (folder / "README.md").read_text()


def test_model_signing_accepts_the_bundle_and_refuses_a_changed_file(site: Site, tmp_path: Path) -> None:
    saved = site.trained(private("data")).save_state()
    site.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    folder = unpacked(tmp_path / "e.age", site, tmp_path / "out")
    tool = Path(sys.executable).with_name("model_signing")
    command = [str(tool), "verify", "key", str(folder)]
    command += ["--signature", str(folder / "model.sig"), "--public_key", str(folder / "model.pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_only_an_exporter_exports_and_only_what_is_its_tenants(site: Site, tmp_path: Path) -> None:
    saved = site.trained(PUBLIC).save_state()
    for tenant, roles, error in (
        ("default", ("trainer", "auditor"), AuthorizationError),
        ("default", ("admin",), AuthorizationError),
        ("stranger", ("exporter",), ResourceNotFoundError),
    ):
        with ServiceClient(site.server.mint_key(tenant, roles), site.server.address) as service, pytest.raises(error):
            service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    with ServiceClient(site.server.mint_key("default", ("exporter",)), site.server.address) as service:
        service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
        with pytest.raises(AuthorizationError):
            service.import_artifact(tmp_path / "e.age", signer=site.key, identity=[str(IDENTITY)])


@pytest.mark.parametrize(
    "named",
    [
        {"recipients": []},
        {"recipients": ["age1nonsense"]},
        {"pq_recipients": ["nonsense"]},
        {"recipients": [RECIPIENT], "pq_recipients": [hpke.Identity(bytes(32)).recipient.text]},
    ],
)
def test_an_export_for_nobody_in_particular_is_refused(site: Site, tmp_path: Path, named: dict[str, Any]) -> None:
    saved = site.trained(PUBLIC).save_state()
    with pytest.raises(InvalidRequestError, match="recipient"):
        site.service.export_artifact(saved.artifact_id, destination=tmp_path / "e", **named)
    assert list(tmp_path.glob("e*")) == []


def test_a_damaged_checkpoint_is_not_exported(site: Site, tmp_path: Path) -> None:
    saved = site.trained(PUBLIC).save_state()
    file = site.folder / "artifacts" / saved.artifact_id
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidRequestError, match="failed verification"):
        site.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    assert list(tmp_path.glob("e*")) == []


def test_an_import_trains_on_where_the_weights_were_and_knows_where_they_came_from(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    here, there = sites
    first = here.trained(private("hospital"))
    saved = first.save_state()
    here.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    info = there.service.import_artifact(tmp_path / "e.age", signer=here.key, identity=[str(IDENTITY)])
    assert info.step == 2
    second = there.trained(private("clinic"), steps=0, start=info.artifact_id)
    assert [s.completion for s in second.sample("the ", max_tokens=20, temperature=0.0).samples] == [
        s.completion for s in first.sample("the ", max_tokens=20, temperature=0.0).samples
    ]
    further = there.trained(private("clinic"), start=info.artifact_id).save_state()
    there.service.export_artifact(further.artifact_id, RECIPIENT, tmp_path / "f.age")
    claims = files.check(tmp_path / "f.age", VerifierKey.parse(there.key), [str(IDENTITY)]).manifest.predicate
    assert claims["privacy"]["dataset_id"] == "clinic"
    (earlier,) = claims["provenance"]
    assert earlier["origin"] == here.signer.origin
    assert earlier["privacy"]["dataset_id"] == "hospital"
    assert earlier["privacy"]["epsilon"] == repr(here.service.get_privacy_ledger("hospital").epsilon_spent)
    (entry,) = there.service.get_audit_logs(operation="import_artifact")
    assert entry.facts["origin"] == here.signer.origin
    assert entry.facts["epsilon"] == earlier["privacy"]["epsilon"]


def test_where_weights_came_from_survives_a_restart_and_a_checkpoint(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    here, there = sites
    saved = here.trained(private("hospital")).save_state()
    here.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    info = there.service.import_artifact(tmp_path / "e.age", signer=here.key, identity=[str(IDENTITY)])
    run_id = there.trained(private("clinic"), start=info.artifact_id).id
    there.close()
    again = Site(there.folder)
    saved = again.service.get_training_client(run_id).save_state()
    third = again.trained(private("third"), start=saved.artifact_id).save_state()
    again.service.export_artifact(third.artifact_id, RECIPIENT, tmp_path / "g.age")
    claims = files.check(tmp_path / "g.age", VerifierKey.parse(again.key), [str(IDENTITY)]).manifest.predicate
    names = {e["privacy"]["dataset_id"]: e["origin"] for e in claims["provenance"]}
    assert names == {"hospital": here.signer.origin, "clinic": again.signer.origin}
    again.close()


def test_weights_of_a_dataset_of_the_same_name_elsewhere_are_refused_for_a_private_run(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    here, there = sites
    saved = here.trained(private("data")).save_state()
    here.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    info = there.service.import_artifact(tmp_path / "e.age", signer=here.key, identity=[str(IDENTITY)])
    for more in ({}, {"initial_weights": "public"}):
        with pytest.raises(DPUnsupportedError, match="two accounts"):
            there.trained(private("data", **more), steps=0, start=info.artifact_id)
    running = there.trained(private("data"), steps=1)
    with pytest.raises(DPUnsupportedError, match="two accounts"):
        running.load_state(info.artifact_id)
    there.trained(PUBLIC, steps=0, start=info.artifact_id)  # without privacy there is nothing to add up
    back = here.service.import_artifact(tmp_path / "e.age", signer=here.key, identity=[str(IDENTITY)])
    here.trained(private("data"), steps=0, start=back.artifact_id)  # our own ledger has it already


def test_weights_without_a_promise_do_not_become_private_by_travelling(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    here, there = sites
    saved = here.trained(PUBLIC).save_state()
    here.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    info = there.service.import_artifact(tmp_path / "e.age", signer=here.key, identity=[str(IDENTITY)])
    with pytest.raises(DPUnsupportedError, match="not in any budget"):
        there.trained(private("clinic"), steps=0, start=info.artifact_id)
    there.trained(private("clinic", initial_weights="public"), steps=0, start=info.artifact_id)


def test_what_was_not_trained_here_leaves_without_a_report_of_ours(sites: tuple[Site, Site], tmp_path: Path) -> None:
    here, there = sites
    saved = here.trained(private("hospital")).save_state()
    here.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    there.trained(private("hospital"), steps=1)  # other data of the same name, whose report says nothing of these
    info = there.service.import_artifact(tmp_path / "e.age", signer=here.key, identity=[str(IDENTITY)])
    there.service.export_artifact(info.artifact_id, RECIPIENT, tmp_path / "f.age")
    reader = files.check(tmp_path / "f.age", VerifierKey.parse(there.key), [str(IDENTITY)])
    assert "report.json" not in reader.files
    (earlier,) = reader.manifest.predicate["provenance"]
    assert earlier["origin"] == here.signer.origin
    assert earlier["privacy"] == reader.manifest.predicate["privacy"]


def test_a_promise_missing_anywhere_in_the_past_is_no_promise(site: Site) -> None:
    def imported(privacy: dict[str, str] | None) -> str:
        entry = {
            "artifact": "ckpt_00000000",
            "base_model": "bigram",
            "manifest": "",
            "origin": "tg-tinker/" + "0" * 32,
            "privacy": privacy,
        }
        config = {"model_ref": "bigram", "lora_config": None}
        weights = header_bytes([("table", "F32", (260, 260), 270_400)], WEIGHTS_METADATA) + bytes(270_400)
        made = replace(source(config=config, ledger=CLAIM, provenance=[entry]), weight_names=["table"])
        data = archive(specimen(made, weights=weights))
        return site.service._transport.upload(
            requests.import_artifact(SIGNER.verifier_key, [data])
        ).artifact.artifact_id

    site.trained(private("clinic"), steps=0, start=imported({**CLAIM, "dataset_id": "more"}))
    for missing in (None, {**CLAIM, "dataset_id": "more", "epsilon": "inf"}):
        with pytest.raises(DPUnsupportedError, match="further from such weights"):
            site.trained(private("clinic"), steps=0, start=imported(missing))


def test_an_unknown_signer_and_a_wrong_one_are_refused_and_leave_nothing(
    sites: tuple[Site, Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = sites
    saved = here.trained(PUBLIC).save_state()
    here.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    with pytest.raises(LogVerificationError, match="no signature of"):
        there.service.import_artifact(tmp_path / "e.age", signer=there.key, identity=[str(IDENTITY)])
    with pytest.raises(InvalidRequestError, match="give the private key"):
        there.service.import_artifact(tmp_path / "e.age", signer=here.key)
    # The client of this test met the server, so its log is pinned; a user elsewhere did not.
    assert there.service.import_artifact(tmp_path / "e.age", identity=[str(IDENTITY)]).step == 2
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "somebody-else"))
    with pytest.raises(InvalidRequestError, match="not known here"):
        there.service.import_artifact(tmp_path / "e.age", identity=[str(IDENTITY)])
    assert len(there.service.list_artifacts()) == 1
    assert len(list((there.folder / "artifacts").glob("ckpt_*"))) == 1


def forged(folder: Path, site: Site, change: dict[str, Any]) -> bytes:
    """The archive with other claims about privacy, signed again with the tenant's real keys."""
    contents = {p.name: p.read_bytes() for p in folder.iterdir()}
    envelope = json.loads(contents[MANIFEST])
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["privacy"].update(change)
    contents[MANIFEST] = rfc8785.dumps(site.signer.sign_dsse(PAYLOAD_TYPE, rfc8785.dumps(statement)))
    model_signer = TenantSigner(site.server._foundation.keyring).model_signer("default")
    digests = {n: hashlib.sha256(d).hexdigest() for n, d in contents.items() if n != BUNDLE}
    artifact_id = statement["predicate"]["artifact"]["id"]
    contents[BUNDLE] = make_bundle(artifact_id, digests, model_signer.public_pem, model_signer.sign)
    ordered = [(n, len(contents[n]), [contents[n]]) for n in sorted(contents, key=ORDER.__getitem__)]
    return b"".join(bytes(p) for p in write_tar(artifact_id, ordered))


def test_not_even_the_signer_can_state_less_than_was_spent(sites: tuple[Site, Site], tmp_path: Path) -> None:
    here, there = sites
    client = here.trained(private("hospital"))
    here.service.export_artifact(client.save_state().artifact_id, RECIPIENT, tmp_path / "e.age")
    folder = unpacked(tmp_path / "e.age", here, tmp_path / "out")
    honest = forged(folder, here, {})
    (tmp_path / "honest.tar").write_bytes(honest)
    there.service.import_artifact(tmp_path / "honest.tar", signer=here.key)
    for change in (
        {"epsilon": "0.5"},
        {"delta": "1e-06"},
        {"unit": "user"},
        {"entries": 1},
        {"head": "00" * 32},
        {"dataset_id": "clinic"},
    ):
        (tmp_path / "forged.tar").write_bytes(forged(folder, here, change))
        with pytest.raises(InvalidRequestError, match="promise"):
            there.service.import_artifact(tmp_path / "forged.tar", signer=here.key)
    assert len(there.service.list_artifacts()) == 1


def test_what_fails_half_way_is_noted_and_leaves_nothing(site: Site, tmp_path: Path) -> None:
    saved = site.trained(PUBLIC).save_state()
    site.service.export_artifact(saved.artifact_id, RECIPIENT, tmp_path / "e.age")
    before = sorted(p.name for p in (site.folder / "artifacts").iterdir())
    with files.open_archive(tmp_path / "e.age", [str(IDENTITY)]) as pieces:
        archive = b"".join(bytes(p) for p in pieces)
    flipped = archive[:-2000] + bytes([archive[-2000] ^ 1]) + archive[-1999:]
    for bad in (archive[:-600], flipped, archive + b"more", b"", b"nonsense" * 1000):
        with pytest.raises(InvalidRequestError, match="refused"):
            site.service._transport.upload(requests.import_artifact(site.key, [bad]))
    with pytest.raises(TGTinkerError, match="verifier key"):
        site.service._transport.upload(requests.import_artifact("nonsense", [archive]))
    assert sorted(p.name for p in (site.folder / "artifacts").iterdir()) == before
    failures = site.service.get_audit_logs(operation="import_artifact")
    assert [f.success for f in failures] == [False] * 5


def test_the_post_quantum_seal_holds_the_same_and_opens_with_its_own_key(site: Site, tmp_path: Path) -> None:
    saved = site.trained(PUBLIC).save_state()
    identity = hpke.Identity.generate()
    written = site.service.export_artifact(
        saved.artifact_id, destination=tmp_path / "e.hpke", pq_recipients=identity.recipient.text
    )
    key = VerifierKey.parse(site.key)
    reader = files.check(written.path, key, [str(IDENTITY), identity.text])
    assert reader.manifest.predicate["artifact"]["id"] == saved.artifact_id
    with pytest.raises(InvalidRequestError, match="not sealed for this identity"):
        files.check(written.path, key, [str(IDENTITY), hpke.Identity(bytes(32)).text])
    info = site.service.import_artifact(written.path, signer=site.key, identity=[identity.text])
    assert info.step == 2


def test_the_command_line_exports_opens_verifies_and_imports(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = site.trained(private("data")).save_state()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TG_TINKER_API_KEY", site.service.config.api_key or "")
    monkeypatch.setenv("TG_TINKER_BASE_URL", site.server.address)
    (tmp_path / "key.txt").write_text(f"# mine\n{IDENTITY}\n")

    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, ["checkpoints", *words])
        assert done.exit_code == code, done.output
        return done.output

    assert saved.artifact_id in run("list")
    assert "checkpoints keygen" not in run("keygen", "--pq", "--out", "pq.key")
    assert "never overwritten" in run("keygen", "--pq", "--out", "pq.key", code=1)
    assert (tmp_path / "pq.key").stat().st_mode & 0o777 == 0o600
    said = run("export", saved.artifact_id, "-r", RECIPIENT, "--pq-recipient", "pq.key.pub")
    assert "export.age" in said
    assert "export.hpke" in said
    for name, key in (("export.age", "key.txt"), ("export.hpke", "pq.key")):
        said = run("verify", name, "-i", key, "--signer", site.key)
        assert "verified: " + name in said
        assert "report epsilon" in said
    assert "sealed for its receiver" in run("verify", "export.age", "--signer", site.key, code=1)
    said = run("open", "export.age", "-i", "key.txt", "--signer", site.key)
    assert f"unpacked into {saved.artifact_id}" in said
    assert "exists" in run("open", "export.age", "-i", "key.txt", "--signer", site.key, code=1)
    assert "verified" in run("verify", saved.artifact_id, "--signer", site.key)
    manifest = str(tmp_path / saved.artifact_id / MANIFEST)
    assert CliRunner().invoke(main, ["audit", "verify", manifest, "--key", site.key]).exit_code == 0
    assert "ckpt_" in run("import", saved.artifact_id, "--signer", site.key)
    (tmp_path / saved.artifact_id / "README.md").write_text("better")
    assert "do not use" in run("verify", saved.artifact_id, "--signer", site.key, code=1)
    (tmp_path / saved.artifact_id / "pytorch_model.bin").write_bytes(b"\x80")
    assert "holds other files" in run("verify", saved.artifact_id, "--signer", site.key, code=1)
    with tarfile.open(tmp_path / "unsigned.tar", "w") as tar:
        tar.add(tmp_path / "key.txt")
    assert "refused" in run("import", "unsigned.tar", "--signer", site.key, code=1)


def test_weights_whose_header_says_more_than_the_file_holds_are_refused(site: Site) -> None:
    """Signed and with the right digest, and still no safetensors file: nothing is allocated for what it claims."""
    claiming = (2**40).to_bytes(8, "little") + b"{}"
    gaps = header_bytes([("a", "F32", (2,), 8)], WEIGHTS_METADATA) + bytes(9)
    for weights in (claiming, gaps, b"", b"\x80\x04pickle", WEIGHTS[:-1]):
        made = archive(specimen(weights=weights))
        with pytest.raises(InvalidRequestError, match="not a safetensors file"):
            site.service._transport.upload(requests.import_artifact(SIGNER.verifier_key, [made]))
    made = archive(specimen())
    start = made.rindex(b"ckpt_0123456789abcdef/adapter_model")
    info = tarfile.TarInfo.frombuf(made[start : start + 512], "utf-8", "strict")
    info.size = 8 * 2**30 - 1
    claimed = made[:start] + info.tobuf(tarfile.USTAR_FORMAT) + made[start + 512 :]
    with pytest.raises(InvalidRequestError, match="refused"):
        site.service._transport.upload(requests.import_artifact(SIGNER.verifier_key, [claimed]))
    assert list((site.folder / "artifacts").glob("ckpt_*")) == []
