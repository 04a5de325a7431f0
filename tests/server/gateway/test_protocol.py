"""The rules of the Tinker protocol, over plain HTTP."""

from __future__ import annotations

import numpy as np

from tests.server.gateway.conftest import Raw


def test_a_model_is_trained_and_every_result_has_the_form_that_clients_read(client: Raw) -> None:
    model = client.create()
    trained = client.outputs(client.train(model, 1, [1, 2, 3], [4, 5, 6, 7]))
    assert trained.metrics["loss:sum"] > 0
    assert all(key.count(":") == 1 for key in trained.metrics)
    (record,) = trained.loss_fn_outputs
    assert record.num_datums == 2
    logprobs = np.frombuffer(record.fields["logprobs"].data, "<f4")
    offsets = np.frombuffer(record.fields["logprobs"].offsets, "<i8")
    assert offsets.tolist() == [0, 8, 20]
    assert np.isclose(-logprobs.sum(), trained.metrics["loss:sum"], rtol=1e-5)
    stepped = client.retrieve(client.step(model, 2))
    assert stepped["metrics"]["unclipped_grad_norm"] > 0
    again = client.outputs(client.train(model, 3, [1, 2, 3], [4, 5, 6, 7], forward_only=True))
    assert again.metrics["loss:sum"] < trained.metrics["loss:sum"]
