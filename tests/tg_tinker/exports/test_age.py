"""age files: the age tool opens ours and we open its; it is another implementation, in another language."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyrage
import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports import age

IDENTITY = pyrage.x25519.Identity.generate()
PUBLIC, SECRET = str(IDENTITY.to_public()), str(IDENTITY)
OTHER = pyrage.x25519.Identity.generate()


def sealed(plain: bytes, *recipients: str) -> bytes:
    sink = io.BytesIO()
    age.seal_age(recipients or (PUBLIC,), [plain[:10], plain[10:]], sink)
    return sink.getvalue()


def opened(data: bytes, *identities: str) -> bytes:
    sink = io.BytesIO()
    age.open_age(identities or (SECRET,), io.BytesIO(data), sink)
    return sink.getvalue()


@pytest.fixture(scope="module")
def age_tool() -> str:
    """The age command line. Where TG_TINKER_REQUIRE_AGE is set, as in CI, its absence is a failure."""
    found = shutil.which("age")
    if found is None and os.environ.get("TG_TINKER_REQUIRE_AGE"):
        pytest.fail("age is not installed and TG_TINKER_REQUIRE_AGE is set: apt-get install age")
    if found is None:
        pytest.skip("the age tool is not installed (apt-get install age)")
    return found


def test_the_age_tool_opens_what_we_seal(age_tool: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"# a comment\n{SECRET}\n")
    plain = os.urandom(200_000)
    done = subprocess.run(
        [age_tool, "-d", "-i", str(tmp_path / "key")], input=sealed(plain, PUBLIC, str(OTHER.to_public())),
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout == plain


def test_we_open_what_the_age_tool_seals(age_tool: str) -> None:
    plain = os.urandom(200_000)
    done = subprocess.run([age_tool, "-r", PUBLIC], input=plain, capture_output=True, check=True)
    assert opened(done.stdout) == plain


def test_the_age_tool_refuses_another_identity(age_tool: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(str(OTHER))
    command = [age_tool, "-d", "-i", str(tmp_path / "key")]
    done = subprocess.run(command, input=sealed(b"x" * 99), capture_output=True, check=False)
    assert done.returncode != 0
    assert done.stdout == b""


def test_what_was_changed_cut_or_sealed_for_others_does_not_open() -> None:
    data = sealed(b"x" * 100)
    flips = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    for bad in (*flips, data[:-1], data[:-50], b"", b"age-encryption.org/v1\n"):
        with pytest.raises(InvalidRequestError, match="refused"):
            opened(bad)
    with pytest.raises(InvalidRequestError, match="refused"):
        opened(data, str(OTHER))


@pytest.mark.parametrize(
    "bad",
    ["", "age1", "ssh-ed25519 AAAA", PUBLIC[:-1], PUBLIC.replace("age1", "age2"), " "],
    ids=["empty", "age1", "ssh", "cut", "age2", "space"],  # the key is another in every process
)
def test_a_text_that_is_no_recipient_is_refused_with_how_to_make_one(bad: str) -> None:
    with pytest.raises(InvalidRequestError, match="age-keygen"):
        age.check_recipients([bad])


def test_a_private_key_given_for_a_public_one_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidRequestError, match="private key") as caught:
        age.check_recipients([SECRET])
    assert SECRET not in caught.value.message


def test_recipients_are_one_to_twenty_and_different() -> None:
    many = [str(pyrage.x25519.Identity.generate().to_public()) for _ in range(21)]
    for bad in ([], [PUBLIC, PUBLIC], many):
        with pytest.raises(InvalidRequestError, match="1 to 20"):
            age.check_recipients(bad)
    assert len(age.check_recipients(many[:20])) == 20


def test_the_error_of_a_source_that_fails_is_its_own() -> None:
    def failing() -> object:
        yield b"x"
        raise LookupError("the disk is gone")

    with pytest.raises(LookupError, match="the disk is gone"):
        age.seal_age([PUBLIC], failing(), io.BytesIO())  # type: ignore[arg-type]


def test_an_identity_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not a private age key"):
        opened(sealed(b"x"), PUBLIC)


def test_without_pyrage_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(InvalidRequestError, match=r"tg-tinker\[export\]"):
        age.check_recipients([PUBLIC])
