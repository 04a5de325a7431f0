import numpy as np

from tg_tinker.types import BatchData
from tg_tinker.types.losses import Loss
from tg_tinker.wire.calls import (
    OPERATION,
    Generate,
    Load,
    LossPass,
    Pass,
    Save,
    Step,
    Updates,
    has_effect,
)


def test_the_digest_of_updates_tells_shapes_and_values_apart_and_not_layouts():
    rows = np.arange(6, dtype=np.float32)
    digests = {Updates(vectors_UP=v, units=()).digest() for v in (rows.reshape(2, 3), rows.reshape(3, 2), rows[:4])}
    assert len(digests) == 3
    turned = np.asfortranarray(rows.reshape(2, 3))
    assert Updates(vectors_UP=turned, units=()).digest() in digests


def test_every_kind_of_call_has_a_name_and_a_known_effect():
    batch = BatchData(input_ids=[[1]])
    updates = Updates(vectors_UP=np.zeros((1, 2), np.float32), units=("u",))
    datums = LossPass(data=(), loss=Loss.of("cross_entropy"))
    calls = [Pass(batch=batch), Step(), Save(), Load(artifact_id="a"), Generate(prompts=("p",)), updates, datums]
    assert {type(c) for c in calls} == set(OPERATION)
    assert [has_effect(c) for c in calls] == [True, True, False, True, False, True, True]
    assert not has_effect(Pass(batch=batch, train=False))
    assert not has_effect(LossPass(data=(), loss=Loss.of("cross_entropy"), train=False))
