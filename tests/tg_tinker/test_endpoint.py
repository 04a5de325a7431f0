import pytest

from tg_tinker._endpoint import parse_base_url, read_tls_files, resolve
from tg_tinker.errors import InvalidRequestError

DEFAULTS = {"api_key": None, "base_url": None, "tenant_id": None, "timeout": 300.0, "retry_count": 3}


@pytest.mark.parametrize(
    ("base_url", "target", "tls"),
    [
        ("localhost:50051", "localhost:50051", False),
        ("localhost", "localhost:50051", False),
        ("127.0.0.1:7", "127.0.0.1:7", False),
        ("127.9.9.9:7", "127.9.9.9:7", False),
        ("[::1]:7", "[::1]:7", False),
        ("grpc://localhost", "localhost:50051", False),
        ("grpc://db.internal:9", "db.internal:9", False),
        ("grpcs://tinker.example:9", "tinker.example:9", True),
        ("GRPCS://tinker.example", "tinker.example:50051", True),
        ("https://tinker.example/", "tinker.example:443", True),
        ("http://localhost:8080", "localhost:8080", False),
    ],
)
def test_addresses_are_understood(base_url, target, tls):
    endpoint = parse_base_url(base_url)
    assert (endpoint.target, endpoint.tls) == (target, tls)


@pytest.mark.parametrize(
    "base_url", ["tinker.example:50051", "http://tinker.example", "10.0.0.7:50051", "[2001:db8::1]:5", "0.0.0.0:5"]
)
def test_plaintext_to_another_machine_must_be_written_out(base_url):
    with pytest.raises(InvalidRequestError, match="unencrypted") as caught:
        parse_base_url(base_url)
    assert caught.value.field == "base_url"
    assert "grpcs://" in caught.value.message


@pytest.mark.parametrize(
    "base_url",
    ["", "://localhost", "ftp://localhost", "localhost:0", "localhost:99999", "localhost:5/path", "a b:5", "h:x"],
)
def test_what_is_no_address_is_refused(base_url):
    with pytest.raises(InvalidRequestError, match="not an address"):
        parse_base_url(base_url)


def test_the_environment_fills_what_was_not_given():
    environ = {
        "TG_TINKER_API_KEY": " tgk_x \n",
        "TG_TINKER_BASE_URL": "grpcs://tinker.example:9",
        "TG_TINKER_TENANT_ID": "clinic",
        "TG_TINKER_TIMEOUT": "12.5",
        "TG_TINKER_RETRY_COUNT": "7",
    }
    config = resolve(**DEFAULTS, environ=environ)
    assert (config.api_key, config.base_url, config.tenant_id) == ("tgk_x", "grpcs://tinker.example:9", "clinic")
    assert (config.timeout, config.retry_count, config.tls) == (12.5, 7, True)


def test_arguments_win_over_the_environment():
    environ = {"TG_TINKER_API_KEY": "theirs", "TG_TINKER_BASE_URL": "grpcs://theirs:9", "TG_TINKER_TIMEOUT": "9"}
    config = resolve(api_key="mine", base_url="localhost:1", tenant_id="t", timeout=5, retry_count=0, environ=environ)
    assert (config.api_key, config.base_url, config.timeout) == ("mine", "localhost:1", 5.0)
    assert "mine" not in repr(config)


def test_without_anything_the_server_is_on_this_machine():
    config = resolve(**DEFAULTS, environ={})
    assert (config.base_url, config.tls, config.api_key) == ("localhost:50051", False, None)


@pytest.mark.parametrize(
    ("changes", "environ", "field"),
    [
        ({"timeout": 0}, {}, "timeout"),
        ({"timeout": float("nan")}, {}, "timeout"),
        ({"retry_count": -1}, {}, "retry_count"),
        ({"tenant_id": "a\nb"}, {}, "tenant_id"),
        ({}, {"TG_TINKER_TIMEOUT": "soon"}, "timeout"),
        ({}, {"TG_TINKER_BASE_URL": "far.example:1"}, "base_url"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(changes, environ, field):
    with pytest.raises(InvalidRequestError) as caught:
        resolve(**{**DEFAULTS, **changes}, environ=environ)
    assert caught.value.field == field


def test_certificates_are_read_from_the_files_named(tmp_path):
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_bytes(name.encode())
    environ = {f"TG_TINKER_TLS_{n.upper()}": str(tmp_path / n) for n in ("ca", "cert", "key")}
    files = read_tls_files(environ)
    assert (files.ca, files.cert, files.key) == (b"ca", b"cert", b"key")
    assert read_tls_files({}).ca is None


@pytest.mark.parametrize("environ", [{"TG_TINKER_TLS_CA": "/nowhere/ca.pem"}, {"TG_TINKER_TLS_CERT": "/dev/null"}])
def test_unusable_certificates_are_refused(environ):
    with pytest.raises(InvalidRequestError):
        read_tls_files(environ)
