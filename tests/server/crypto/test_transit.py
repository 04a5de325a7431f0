"""The root key in Vault, against a local stand-in for its transit API (tests/support/fake_vault.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_vault import FakeVault, running_vault
from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker_server.crypto.aead import DecryptionError
from tg_tinker_server.crypto.keys import KeyProvider, key_provider

KEY = bytes(range(32))


@pytest.fixture(params=[True, False], ids=["derived", "plain"])
def vault(request: pytest.FixtureRequest) -> Iterator[FakeVault]:
    with running_vault(derived=request.param) as running:
        yield running


def provider(vault: FakeVault, name: str = "tg-tinker", token: str | None = None) -> KeyProvider:
    return key_provider(f"vault:{vault.url}/transit/keys/{name}", {"VAULT_TOKEN": token or vault.token})


def test_a_wrapped_key_opens_for_its_own_row_only_whatever_kind_the_transit_key_is(vault: FakeVault) -> None:
    keys = provider(vault)
    wrapped = keys.wrap(KEY, b"row 1")
    assert KEY not in wrapped
    assert keys.unwrap(wrapped, b"row 1") == KEY
    with pytest.raises(DecryptionError):
        keys.unwrap(wrapped, b"row 2")


def test_what_was_changed_or_never_wrapped_does_not_open(vault: FakeVault) -> None:
    keys = provider(vault)
    wrapped = keys.wrap(KEY, b"row")
    middle = bytearray(wrapped)
    middle[40] = ord("A") if middle[40] != ord("A") else ord("B")
    for bad in (bytes(middle), wrapped[:-4], b"", b"vault:v9:AAAA", b"\xff\xfe"):
        with pytest.raises(DecryptionError):
            keys.unwrap(bad, b"row")


def test_a_key_that_vault_rotated_still_opens_what_it_wrapped(vault: FakeVault) -> None:
    keys = provider(vault)
    wrapped = keys.wrap(KEY, b"row")
    vault.rotate("tg-tinker")
    assert keys.unwrap(wrapped, b"row") == KEY
    assert keys.wrap(KEY, b"row").startswith(b"vault:v2:")


def test_a_refusal_says_what_the_token_needs(vault: FakeVault) -> None:
    with pytest.raises(ServerError, match="transit/decrypt/tg-tinker"):
        provider(vault, token="hvs.other").wrap(KEY, b"row")


def test_a_missing_key_and_a_missing_engine_are_the_operators_to_mend(vault: FakeVault) -> None:
    with pytest.raises(ServerError, match="refuses the transit key absent"):
        provider(vault, "absent").wrap(KEY, b"row")
    elsewhere = key_provider(f"vault:{vault.url}/kv/keys/tg-tinker", {"VAULT_TOKEN": vault.token})
    with pytest.raises(ServerError, match="no transit key"):
        elsewhere.wrap(KEY, b"row")


def test_a_vault_that_is_away_is_an_error_to_try_again_after_and_not_a_wrong_key() -> None:
    with running_vault() as vault:
        keys = provider(vault)
        wrapped = keys.wrap(KEY, b"row")
    with pytest.raises(ServerError, match="does not answer") as caught:
        keys.unwrap(wrapped, b"row")
    assert caught.value.details["retry"] is True


def test_the_token_may_lie_in_a_file_that_somebody_renews(vault: FakeVault, tmp_path: Path) -> None:
    file = tmp_path / "token"
    keys = key_provider(f"vault:{vault.url}/transit/keys/tg-tinker", {"VAULT_TOKEN_FILE": str(file)})
    with pytest.raises(InvalidRequestError, match="no Vault token"):
        keys.wrap(KEY, b"row")
    file.write_text("hvs.old\n")
    with pytest.raises(ServerError, match="denies"):
        keys.wrap(KEY, b"row")
    file.write_text(vault.token + "\n")
    assert keys.unwrap(keys.wrap(KEY, b"row"), b"row") == KEY


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("http://vault.example:8200/transit/keys/k", "unencrypted"),
        ("https://vault.example:8200/transit/k", "URI"),
        ("https://user:secret@vault.example/transit/keys/k", "URI"),
        ("https://vault.example/transit/keys/a/b?c", "URI"),
        ("file:///etc/passwd", "URI"),
    ],
)
def test_a_uri_that_is_no_transit_key_is_refused_and_not_repeated(where: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why) as caught:
        key_provider("vault:" + where)
    assert "secret" not in caught.value.message


def test_without_hvac_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hvac", None)
    with pytest.raises(InvalidRequestError, match=r"tg-tinker\[vault\]"):
        key_provider("vault:https://vault.example/transit/keys/k")
