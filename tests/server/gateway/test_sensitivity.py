"""Remove any one unit of any loss's batch, sent over HTTP: the clipped sum moves by at most C.

The released sum is read from the weights: the backend steps with plain SGD, rate 1 and no noise, whatever was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tg_tinker.proto.v1 import gateway_pb2 as pb
from tg_tinker.types import OptimizerConfig, TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.empirical.watching import Watch, WatchedBackend, WatchedSession
from tg_tinker_server.engine.backend import StepRequest, StepResult
from tg_tinker_server.engine.bigram import MODEL_NAME, BigramBackend

BOUND = 0.05
ROUNDING = 1e-5
PROMPTS = ([5, 6, 7, 8], [5, 6, 9], [11, 12, 13, 14, 15])

Example = dict[str, Any]  # the tokens of a datum, its inputs, and which unit it is of
Batch = Sequence[Example]


class _Noiseless(WatchedSession):
    def step(self, request: StepRequest) -> StepResult:
        return super().step(replace(request, mechanism=None, adam=None, learning_rate=1.0, global_clip=None))


class _Recording(WatchedBackend):
    """One whole table, plain SGD; privacy as the service asks for it."""

    def open(self, *, run_id: str, config: TrainingConfig) -> WatchedSession:
        sgd = OptimizerConfig(name="sgd", momentum=0.0, nesterov=False)
        plain = config.model_copy(update={"lora_config": None, "optimizer": sgd})
        return _Noiseless(BigramBackend().open(run_id=run_id, config=plain), self._watch, plain)


class Door:
    """A client of the protocol, as small as one can be."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=url + "/api/v1/", headers={"X-API-Key": "tml-" + key}, timeout=60)
        self.session = self._post("create_session", tags=[], sdk_version="0")["session_id"]
        self.models = 0

    def create(self, **privacy: Any) -> str:
        """A private model: the noise is not drawn here, its size does not matter."""
        optimizer = {
            "type": "dp_adamw",
            "target_epsilon": 1e6,
            "noise_multiplier": 1.0,
            "max_grad_norm": BOUND,
            **privacy,
        }
        self.models += 1
        made = self._post(
            "create_model",
            session_id=self.session,
            model_seq_id=self.models,
            base_model=MODEL_NAME,
            lora_config={"rank": 1},
            optimizer_config=optimizer,
        )
        return str(self._json(made)["model_id"])

    def train(self, model: str, calls: Sequence[tuple[Batch, bool]], loss: str) -> None:
        """Passes, each with whether it is forward only, then a step."""
        for seq, (batch, forward_only) in enumerate(calls, start=1):
            message = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss, forward_only=forward_only)
            for example in batch:
                datum = message.data.add()
                datum.model_input.add().encoded_text.tokens = np.asarray(example["tokens"], "<i4").tobytes()
                for name, values in example["inputs"].items():
                    whole = name in ("target_tokens", "x_unit")
                    array = np.asarray(values, "<i8" if whole else "<f4")
                    tensor = datum.loss_fn_inputs[name]
                    tensor.dense, tensor.dtype = array.tobytes(), pb.DTYPE_INT64 if whole else pb.DTYPE_FLOAT32
                    tensor.shape.extend(array.shape)
            body = message.SerializeToString()
            sent = self.http.post(
                "forward_backward", content=body, headers={"Content-Type": "application/x-protobuf"}
            )
            self._outcome(sent.raise_for_status().json()["request_id"])
        self._json(
            self._post("optim_step", model_id=model, seq_id=len(calls) + 1, adam_params={"learning_rate": 1.0})
        )

    def _post(self, path: str, **body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _json(self, promised: Any) -> Any:
        return self._outcome(promised["request_id"]).json()

    def _outcome(self, request_id: str) -> httpx.Response:
        while True:
            answer = self.http.post("retrieve_future", json={"request_id": request_id})
            if answer.status_code == 408:
                continue
            assert answer.status_code == 200, answer.text
            if "json" in answer.headers["content-type"] and "error" in answer.json():
                raise Refused(answer.json()["error"])
            return answer


class Refused(Exception):
    """What the server answered."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, Watch]]:
    folder: Path = tmp_path_factory.mktemp("data")
    watch = Watch()
    config = ServerConfig(port=0, tinker_port=0, backend="bigram", data_dir=folder, max_runs_per_tenant=256)
    with EmbeddedServer(config, backend=_Recording(BigramBackend(), watch)) as server:
        yield Door(server.tinker_url, server.mint_key()), watch


def supervised(tokens: list[int], weights: list[float] | None = None) -> Example:
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": weights or [1.0] * (len(tokens) - 1)}
    return {"tokens": tokens[:-1], "inputs": inputs}


def answered(prompt: list[int], sampled: list[int], advantage: float) -> Example:
    before, tokens = [0.0] * (len(prompt) - 1), [*prompt, *sampled]
    inputs = {
        "target_tokens": tokens[1:],
        "logprobs": before + [-3.0] * len(sampled),
        "advantages": before + [advantage] * len(sampled),
        "sequence_ratio_mask": before + [1.0] * len(sampled),
    }
    return {"tokens": tokens[:-1], "inputs": inputs}


def records() -> list[list[Example]]:
    """Four records; two of them are equal."""
    texts = ([1, 2, 3, 4], [9, 8, 7, 6, 5], [1, 2, 3, 4], [40, 41, 42])
    return [[supervised(t, [0.0] + [1.0] * (len(t) - 2))] for t in texts]


def users() -> list[list[Example]]:
    """Three users of one to three records, named by ids."""
    of_user = ([[1, 2, 3], [1, 2, 3], [4, 5, 6]], [[1, 2, 3]], [[7, 8], [9, 10, 11]])
    units = [[supervised(t) for t in texts] for texts in of_user]
    for user, unit in enumerate(units):
        for example in unit:
            example["inputs"]["x_unit"] = [user]
    return units


def groups() -> list[list[Example]]:
    """Answers to three prompts, with advantages of both signs."""
    return [[answered(p, [20 + i, 21, 22], a) for i, a in enumerate((1.0, -0.5, -0.5))] for p in PROMPTS]


def pairs() -> list[list[Example]]:
    """Chosen and rejected, with the weights that a loss of the client has."""
    return [[supervised([1, 2, 3, i], [0.7] * 3), supervised([1, 2, 4, i], [-0.7] * 3)] for i in (30, 31, 32)]


CASES: dict[str, tuple[Callable[[], list[list[Example]]], str, dict[str, Any]]] = {
    "cross_entropy, datum": (records, "cross_entropy", {}),
    "cross_entropy, user": (users, "cross_entropy", {"privacy_unit": "user"}),
    **{
        f"{loss}, group": (groups, loss, {"privacy_unit": "group"})
        for loss in ("importance_sampling", "ppo", "cispo", "dro", "gspo")
    },
    "custom loss, pair": (pairs, "cross_entropy", {"privacy_unit": "pair", "custom_loss": "independent"}),
}


def clipped_sum(watched: tuple[Door, Watch], calls: Sequence[tuple[Batch, bool]], loss: str, **privacy: Any) -> Any:
    """What one step of a new model releases, without noise."""
    door, watch = watched
    watch.forget()
    door.train(door.create(**privacy), calls, loss)
    (step,) = watch.steps
    return step.released_P


@pytest.mark.parametrize("case", CASES)
def test_one_unit_moves_the_clipped_sum_by_at_most_the_bound(watched: tuple[Door, Watch], case: str) -> None:
    units_of, loss, privacy = CASES[case]
    units = units_of()
    whole = clipped_sum(watched, [([d for unit in units for d in unit], False)], loss, **privacy)
    moved = []
    for left_out in range(len(units)):
        rest = [d for i, unit in enumerate(units) if i != left_out for d in unit]
        moved.append(np.linalg.norm(whole - clipped_sum(watched, [(rest, False)], loss, **privacy)))
    assert max(moved) <= BOUND * (1 + ROUNDING)
    assert max(moved) > 0.99 * BOUND, "the bound is what holds it"


def test_a_group_that_comes_in_two_calls_is_clipped_once(watched: tuple[Door, Watch]) -> None:
    units = groups()
    datums = [d for unit in units for d in unit]
    cut = [(datums[:4], False), (datums[4:], False)]
    privacy = {"privacy_unit": "group"}
    whole = clipped_sum(watched, [(datums, False)], "importance_sampling", **privacy)
    assert np.allclose(whole, clipped_sum(watched, cut, "importance_sampling", **privacy), atol=1e-6)
    without = [(datums[:3], False), (datums[6:], False)]
    moved = np.linalg.norm(whole - clipped_sum(watched, without, "importance_sampling", **privacy))
    assert moved <= BOUND * (1 + ROUNDING)


def test_a_unit_in_two_calls_is_refused_where_nothing_is_merged(watched: tuple[Door, Watch]) -> None:
    datums = [d for unit in groups() for d in unit]
    with pytest.raises(Refused, match="merge_units"):
        clipped_sum(
            watched,
            [(datums[:4], False), (datums[4:], False)],
            "importance_sampling",
            privacy_unit="group",
            merge_units=False,
        )


@pytest.mark.parametrize("unit", ["datum", "sequence", "pair"])
@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_losses_over_a_group_are_refused_where_the_unit_is_smaller(
    watched: tuple[Door, Watch], loss: str, unit: str
) -> None:
    answers = [d for group in groups() for d in group[:2]]
    if unit == "sequence":
        answers = [{**d, "inputs": {**d["inputs"], "x_unit": [i]}} for i, d in enumerate(answers)]
    with pytest.raises(Refused, match="protects less than a group"):
        clipped_sum(watched, [(answers, False)], loss, privacy_unit=unit)


FORWARD = [supervised([1, 2, 3], [0.0, 0.0]), supervised([4, 5, 6], [0.0, 0.0])]
BACKWARD = [supervised([1, 2, 3], [0.3, 0.2]), supervised([4, 5, 6], [0.1, 0.9])]


def test_a_custom_loss_over_several_units_is_refused(watched: tuple[Door, Watch]) -> None:
    with pytest.raises(Refused, match="whole batch"):
        clipped_sum(watched, [(FORWARD, True), (BACKWARD, False)], "cross_entropy")
    everyone = [d for pair in pairs() for d in pair]
    for unit in ("datum", "pair"):
        with pytest.raises(Refused, match="whole batch"):
            clipped_sum(watched, [(everyone, False)], "cross_entropy", privacy_unit=unit)


@pytest.mark.parametrize("terms", [{"privacy_unit": "pair"}, {"custom_loss": "independent"}])
def test_a_custom_loss_of_one_unit_and_one_that_is_attested_are_trained_on(
    watched: tuple[Door, Watch], terms: dict[str, str]
) -> None:
    calls = [(FORWARD, True), (FORWARD, True), (BACKWARD, False)]
    assert np.linalg.norm(clipped_sum(watched, calls, "cross_entropy", **terms)) > 0


def test_equal_records_of_two_calls_are_not_merged(watched: tuple[Door, Watch]) -> None:
    """Merged and clipped once, the one would hide or turn what the other adds: up to 2C."""
    one, other = supervised([5, 6, 7, 100], [0.0, 0.0, 5.0]), supervised([5, 6, 7, 101], [0.0, 0.0, 1.0])
    with pytest.raises(Refused, match="merges what somebody named"):
        clipped_sum(watched, [([one], False), ([other], False)], "cross_entropy", merge_units=True)
    pair = [supervised([5, 6, 7, 100]), supervised([5, 6, 8, 100])]
    with pytest.raises(Refused, match="merges what somebody named"):
        clipped_sum(watched, [(pair, False), (pair, False)], "cross_entropy", privacy_unit="pair", merge_units=True)


@pytest.mark.parametrize("loss", ["importance_sampling", "cispo", "dro"])
def test_a_group_without_old_log_probabilities_is_one_unit(watched: tuple[Door, Watch], loss: str) -> None:
    units = groups()
    for example in (e for unit in units for e in unit):
        example["inputs"]["logprobs"] = [0.0] * len(example["inputs"]["logprobs"])
    whole = clipped_sum(watched, [([d for u in units for d in u], False)], loss, privacy_unit="group")
    rest = clipped_sum(watched, [([d for u in units[1:] for d in u], False)], loss, privacy_unit="group")
    assert 0 < np.linalg.norm(whole - rest) <= BOUND * (1 + ROUNDING)
