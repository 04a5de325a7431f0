"""API keys: mistyped ones are told apart at once, wrong ones by a MAC."""

from __future__ import annotations

import hmac
import re
import zlib

import pytest

from tg_tinker.errors import AuthenticationError
from tg_tinker_server.crypto import api_keys
from tg_tinker_server.crypto.api_keys import ApiKey

PEPPER = bytes(range(32))


def test_a_minted_key_has_the_published_shape_and_parses_back() -> None:
    key = api_keys.mint()
    found = re.fullmatch(r"tgk_([0-9a-f]{16})_([0-9a-f]{64})([0-9a-f]{8})", key.text)
    assert found is not None
    assert int(found[3], 16) == zlib.crc32(key.text[:-8].encode())
    assert api_keys.parse(f" {key.text}\n") == key


def test_minted_keys_differ() -> None:
    assert len({api_keys.mint().secret for _ in range(100)}) == 100


def test_every_single_mistyped_digit_is_noticed_without_a_server() -> None:
    text = api_keys.mint().text
    for position in range(len("tgk_"), len(text)):
        if text[position] == "_":
            continue
        for digit in "0123456789abcdef".replace(text[position], ""):
            with pytest.raises(AuthenticationError, match="mistyped") as caught:
                api_keys.parse(text[:position] + digit + text[position + 1 :])
            assert text[-40:-8] not in str(caught.value)


def test_swapped_neighbours_are_noticed() -> None:
    text = api_keys.mint().text
    for i in range(21, len(text) - 1):
        if text[i] != text[i + 1]:
            with pytest.raises(AuthenticationError, match="mistyped"):
                api_keys.parse(text[:i] + text[i + 1] + text[i] + text[i + 2 :])


@pytest.mark.parametrize("change", ["", "tgk_", "sk-abc", "cut", "more", "upper", "arabic"])
def test_what_is_not_a_key_is_refused_and_never_repeated(change: str) -> None:
    text = api_keys.mint().text
    bad = {"cut": text[:-1], "more": text + "0", "upper": text.upper(), "arabic": text[:-1] + "٣"}.get(change, change)
    with pytest.raises(AuthenticationError, match="not a TG-Tinker API key") as caught:
        api_keys.parse(bad)
    assert text[30:60] not in str(caught.value)


def test_only_the_same_key_under_the_same_pepper_matches() -> None:
    key = api_keys.mint()
    stored = api_keys.mac(key, PEPPER)
    assert len(stored) == 32
    assert api_keys.matches(key, PEPPER, stored)
    assert not api_keys.matches(key, bytes(32), stored)
    assert not api_keys.matches(ApiKey(key_id=key.key_id, secret=bytes(32)), PEPPER, stored)
    assert not api_keys.matches(ApiKey(key_id="0" * 16, secret=key.secret), PEPPER, stored)
    assert not api_keys.matches(key, PEPPER, b"")


def test_comparison_takes_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    key = api_keys.mint()
    stored = api_keys.mac(key, PEPPER)
    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    assert api_keys.matches(key, PEPPER, stored)
    assert compared == [(stored, stored)]


def test_a_short_pepper_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 bytes"):
        api_keys.mac(api_keys.mint(), b"pepper")


def test_the_repr_does_not_show_the_secret() -> None:
    key = api_keys.mint()
    assert key.secret.hex() not in repr(key)
    assert repr(key.secret) not in repr(key)
