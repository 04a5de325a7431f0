"""What a budget will be is what it then is: forecasts, refusals, plans, for every accountant and way of sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import batch
from tg_tinker import (
    DPBudgetExceededError,
    DPConfig,
    InvalidRequestError,
    ResourceNotFoundError,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.privacy import gate_epsilon, plan
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.dp.accounting import prv_epsilon

SAMPLING: dict[str, dict[str, Any]] = {
    "none": {},
    "poisson": {"dataset_size": 40},
    "max_participation": {"max_participation": 5},
}
ACCOUNTANTS = ("rdp", "prv", "gdp")
everything = pytest.mark.parametrize(
    ("accountant", "sampling"), [(a, s) for a in ACCOUNTANTS for s in SAMPLING], ids=str
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    folder: Path = tmp_path_factory.mktemp("server")
    config = ServerConfig(port=0, backend="bigram", data_dir=folder / "data", log_level="error")
    with (
        EmbeddedServer(config) as server,
        ServiceClient(api_key=server.mint_key("tenant"), base_url=server.address) as client,
    ):
        yield client


def create(service: ServiceClient, accountant: str, sampling: str, name: str, **settings: Any) -> TrainingClient:
    steps = settings.pop("max_steps", 5)
    dp = DPConfig(
        **{
            "noise_multiplier": 2.0,
            "target_epsilon": 50.0,
            "accountant_type": accountant,
            "sampling": sampling,
            "dataset_id": f"{name}-{accountant}-{sampling}",
            **SAMPLING[sampling],
            **settings,
        }
    )
    return service.create_training_client(
        TrainingConfig(model_ref="bigram", batch_size=4, seed=3, max_steps=steps, dp_config=dp)
    )


def step(client: TrainingClient, seed: int = 0) -> float:
    """One step on the four records of this seed; epsilon after it."""
    client.forward_backward(batch(seed), privacy_unit_ids=[f"{seed}-{i}" for i in range(4)]).result()
    return client.optim_step().result().dp_metrics.total_epsilon


@everything
def test_n_steps_cost_what_the_forecast_of_n_said(service: ServiceClient, accountant: str, sampling: str) -> None:
    client = create(service, accountant, sampling, "forecast")
    forecasts = [client.privacy.epsilon_after(n) for n in range(6)]
    assert forecasts[0] == client.privacy.total_epsilon == 0.0
    spent = [step(client) for _ in range(5)]
    assert spent == pytest.approx(forecasts[1:], abs=1e-9)
    assert client.privacy.total_epsilon == pytest.approx(forecasts[5], abs=1e-9)
    # The second answer: the SDK's own arithmetic, and Opacus's PRV.
    rate = 0.1 if sampling == "poisson" else 1.0
    by_gate = gate_epsilon({(2.0, rate): 5}, 1e-5)
    expected = by_gate
    if accountant == "prv" and sampling != "max_participation":
        expected = min(by_gate, prv_epsilon(2.0, rate, 5, 1e-5))
    assert spent[-1] == pytest.approx(expected, abs=1e-9)


@everything
def test_a_forecast_in_the_middle_counts_what_was_spent(
    service: ServiceClient, accountant: str, sampling: str
) -> None:
    client = create(service, accountant, sampling, "middle")
    step(client)
    step(client)
    forecast = client.privacy.epsilon_after(3)
    for _ in range(3):
        last = step(client)
    assert last == pytest.approx(forecast, abs=1e-9)


@everything
def test_the_steps_that_remain_are_taken_and_one_more_is_refused(
    service: ServiceClient, accountant: str, sampling: str
) -> None:
    rate = 0.1 if sampling == "poisson" else 1.0
    target = gate_epsilon({(2.0, rate): 3}, 1e-5) + 1e-6  # three steps by the gate, and not four
    more = {"max_participation": 9} if sampling == "max_participation" else {}
    client = create(service, accountant, sampling, "remaining", target_epsilon=target, max_steps=30, **more)
    remaining = client.privacy.steps_remaining()
    assert remaining >= 3
    assert remaining == 3 or accountant == "prv"
    for left in range(int(remaining), 0, -1):
        assert client.privacy.steps_remaining() == left
        assert step(client) <= target
    assert client.privacy.steps_remaining() == 0
    before = client.privacy.total_epsilon
    with pytest.raises(DPBudgetExceededError):
        step(client)
    assert client.privacy.total_epsilon == before


@everything
def test_a_run_that_cannot_afford_one_step_is_not_created(
    service: ServiceClient, accountant: str, sampling: str
) -> None:
    rate = 0.1 if sampling == "poisson" else 1.0
    one = min(gate_epsilon({(2.0, rate): 1}, 1e-5), prv_epsilon(2.0, rate, 1, 1e-5))
    with pytest.raises(DPBudgetExceededError) as caught:
        create(service, accountant, sampling, "poor", target_epsilon=one - 1e-3, max_steps=1)
    assert caught.value.max_epsilon == one - 1e-3
    with pytest.raises(ResourceNotFoundError):  # nothing was opened
        service.get_privacy_ledger(f"poor-{accountant}-{sampling}")


@everything
def test_auto_lasts_for_the_planned_steps_and_hardly_longer(
    service: ServiceClient, accountant: str, sampling: str
) -> None:
    client = create(service, accountant, sampling, "auto", noise_multiplier="auto", target_epsilon=4.0)
    for _ in range(5):
        total = step(client)
    assert total <= 4.0
    state = client.get_info().privacy
    assert state is not None
    by_gate = gate_epsilon({(state.noise_multiplier, state.sample_rate): 5}, 1e-5)
    assert 3.99 < by_gate <= 4.0  # the noise is the least that keeps the target, by the gate


@pytest.mark.parametrize("sampling", list(SAMPLING))
def test_a_plan_becomes_a_run_that_spends_what_it_said(service: ServiceClient, sampling: str) -> None:
    sizes = {} if sampling == "none" else {"batch_size": 4, "dataset_size": 40 if sampling == "poisson" else 8}
    found = plan(epsilon=6.0, delta=1e-5, steps=12, sampling=sampling, **sizes)  # type: ignore[arg-type]
    dp = found.dp_config(dataset_id=f"planned-{sampling}")
    client = service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=4, dp_config=dp))
    for n in range(found.steps):
        total = step(client, seed=n % 2)  # two halves of the data, in order
        releases = found.releases_after(n + 1)
        assert total == pytest.approx(
            gate_epsilon({(found.noise_multiplier, found.sample_rate): releases}, 1e-5), abs=1e-9
        )
    assert total == pytest.approx(found.epsilon, abs=1e-9)
    assert total <= 6.0
    with pytest.raises((DPBudgetExceededError, InvalidRequestError)):
        step(client, seed=found.steps % 2)


def test_without_a_target_there_is_no_end(service: ServiceClient) -> None:
    client = create(service, "rdp", "none", "endless", target_epsilon=None)
    assert client.privacy.steps_remaining() == math.inf
