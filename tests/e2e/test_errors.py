"""Every error class, from something that really happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.e2e.server_process import batch, free_port
from tg_tinker import (
    AuthenticationError,
    AuthorizationError,
    DPBudgetExceededError,
    DPConfig,
    DPUnsupportedError,
    FederationRefusedError,
    FutureCancelledError,
    FutureTimeoutError,
    InvalidRequestError,
    LogVerificationError,
    RateLimitedError,
    ResourceNotFoundError,
    ServerError,
    ServiceClient,
    TGTinkerError,
    TrainingConfig,
)
from tg_tinker.federated.messages import Envelope
from tg_tinker.transparency.note import Checkpoint, VerifierKey
from tg_tinker.transparency.pins import Pin, Pins
from tg_tinker.wire.status import TABLE
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto import api_keys
from tg_tinker_server.crypto.signing import TenantSigner

CONFIG = TrainingConfig(model_ref="bigram", batch_size=4)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data", max_runs_per_tenant=2)
    with EmbeddedServer(config) as running:
        yield running


def connect(server: EmbeddedServer, *roles: str, key: str | None = None) -> ServiceClient:
    key = key or server.mint_key("tenant-a", roles or ("trainer", "exporter", "auditor"))
    return ServiceClient(api_key=key, base_url=server.address, retry_count=0, timeout=60)


def private(**settings: object) -> TrainingConfig:
    dp = DPConfig(**{"target_epsilon": 6.0, "dataset_id": "d", **settings})  # type: ignore[arg-type]
    return CONFIG.model_copy(update={"dp_config": dp})


def wrong_key(server: EmbeddedServer) -> None:
    connect(server, key=api_keys.mint().text).get_server_capabilities()


def key_without_the_role(server: EmbeddedServer) -> None:
    connect(server, "auditor").create_training_client(CONFIG)


def one_run_too_many(server: EmbeddedServer) -> None:
    service = connect(server)
    for _ in range(3):
        service.create_training_client(CONFIG)


def bad_batch(server: EmbeddedServer) -> None:
    connect(server).create_training_client(CONFIG).forward_backward({"input_ids": [[10**7, 1]]}).result()


def step_without_noise(server: EmbeddedServer) -> None:
    client = connect(server).create_training_client(private())
    client.forward_backward(batch(1)).result()
    client.optim_step(apply_dp_noise=False).result()


def unknown_artifact(server: EmbeddedServer) -> None:
    connect(server).pull_artifact("ckpt_" + "0" * 24)


def spent_budget(server: EmbeddedServer) -> None:
    client = connect(server).create_training_client(private())
    for seed in range(100):
        client.forward_backward(batch(seed)).result()
        client.optim_step().result()


def impatience(server: EmbeddedServer) -> None:
    client = connect(server).create_training_client(CONFIG)
    futures = [client.forward_backward(batch(seed)) for seed in range(50)]
    try:
        futures[-1].result(timeout=0.001)
    finally:
        assert futures[-1].result(timeout=60).num_tokens == 48  # the operation went on


def cancelled(server: EmbeddedServer) -> None:
    client = connect(server).create_training_client(CONFIG)
    futures = [client.forward_backward(batch(seed)) for seed in range(50)]
    assert futures[-1].cancel()
    futures[-1].result(timeout=60)


def nobody_there(server: EmbeddedServer) -> None:
    ServiceClient(
        api_key=server.mint_key(), base_url=f"127.0.0.1:{free_port()}", retry_count=0, timeout=2
    ).get_server_capabilities()


def put_back(server: EmbeddedServer) -> None:
    """As if this user had seen a larger log of the same server."""
    keyring = server._foundation.keyring
    keyring.ensure("put-back")
    signer = TenantSigner(keyring).signer("put-back")
    note = signer.sign_note(Checkpoint(signer.origin, 1000, bytes(32)).body())
    Pins.of_user().put(Pin(VerifierKey.parse(signer.verifier_key), note, datetime.now(UTC)))
    ServiceClient(api_key=server.mint_key("put-back"), base_url=server.address).check_log()


def altered_on_the_way(server: EmbeddedServer) -> None:
    key = Ed25519PrivateKey.generate()
    sent = Envelope(kind="train", direction="request", job="0" * 64, site="north", round=1).signed(key)
    replace(sent, round=2).verify(key.public_key())


CAUSES: dict[type[TGTinkerError], Callable[[EmbeddedServer], None]] = {
    AuthenticationError: wrong_key,
    AuthorizationError: key_without_the_role,
    RateLimitedError: one_run_too_many,
    InvalidRequestError: bad_batch,
    DPUnsupportedError: step_without_noise,
    ResourceNotFoundError: unknown_artifact,
    DPBudgetExceededError: spent_budget,
    FutureTimeoutError: impatience,
    FutureCancelledError: cancelled,
    FederationRefusedError: altered_on_the_way,
    LogVerificationError: put_back,
    ServerError: nobody_there,
}


def test_every_class_has_a_cause() -> None:
    assert set(CAUSES) == set(TABLE) - {TGTinkerError}


@pytest.mark.parametrize("kind", list(CAUSES), ids=lambda k: k.__name__)
def test_the_cause_raises_its_class_with_code_message_and_details(
    server: EmbeddedServer, kind: type[TGTinkerError]
) -> None:
    with pytest.raises(kind) as caught:
        CAUSES[kind](server)
    error = caught.value
    assert type(error) is kind
    assert error.code == kind.code
    assert len(error.message) > 15
    _, names = TABLE[kind]
    assert all(name in error.details for name in names)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"input_ids": [[1, 2, 3], [4, 5]]}, "batch.input_ids"),
        ({"input_ids": [[1, 2, 300]]}, "batch.input_ids"),
        ({"input_ids": [[1, 2, -3]]}, "batch.input_ids"),
        ({"input_ids": []}, "batch.input_ids"),
        ({"input_ids": [[1] * 4096]}, "batch.input_ids"),
        ({"input_ids": np.ones((2, 3), dtype=np.float32)}, "batch.input_ids"),
        ({"input_ids": [[1, 2]], "labels": [[1, 300]]}, "batch.labels"),
        ({"input_ids": [[1, 2]], "labels": np.array([[np.nan, 1.0]])}, "batch.labels"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "batch.attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "batch.attention_mask"),
        ({"input_ids": [[1, 2]], "weights": [[1.0, np.nan]]}, "batch"),
        ({"labels": [[1, 2]]}, "batch.input_ids"),
        ([{"input_ids": [1, 2]}], "batch"),
    ],
)
def test_a_bad_batch_names_field_and_constraint_and_the_session_goes_on(
    server: EmbeddedServer, bad: object, field: str
) -> None:
    client = connect(server).create_training_client(CONFIG)
    with pytest.raises(InvalidRequestError) as caught:
        client.forward_backward(bad).result()  # type: ignore[arg-type]
    assert caught.value.field == field
    assert caught.value.constraint
    with pytest.raises(InvalidRequestError):
        client.optim_step().result()  # there is no whole batch to step with
    client.forward_backward(batch(2)).result()
    assert client.optim_step().result().step == 1
