import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import OptimizerConfig
from tg_tinker_server.engine.schedules import learning_rate_at


def rates(steps=10, max_steps=10, **settings):
    config = OptimizerConfig(learning_rate=2.0, **settings)
    return [learning_rate_at(config, step=s, max_steps=max_steps) for s in range(steps)]


def test_constant_stays():
    assert rates(lr_scheduler="constant", max_steps=None) == [2.0] * 10


def test_warmup_rises_linearly_and_wastes_no_step():
    assert rates(warmup_steps=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_falls_to_nothing_at_the_end():
    assert rates(11, lr_scheduler="linear") == pytest.approx([2.0 - 0.2 * s for s in range(11)])


def test_cosine_is_half_way_in_the_middle():
    found = rates(11, lr_scheduler="cosine")
    assert (found[0], found[5], found[10]) == pytest.approx((2.0, 1.0, 0.0))


def test_restarts_begin_anew():
    found = rates(11, lr_scheduler="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2})
    assert found[0] == found[5] == 2.0
    assert found[4] < 0.2
    assert found[10] == 0.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_with_restarts"])
def test_a_floor_is_never_crossed(kind):
    found = rates(15, lr_scheduler=kind, lr_scheduler_kwargs={"min_lr_ratio": 0.25}, warmup_steps=2)
    assert min(found[2:]) == pytest.approx(0.5)
    assert max(found) == 2.0


def test_total_steps_of_the_schedule_win_over_those_of_the_run():
    found = rates(lr_scheduler="linear", lr_scheduler_kwargs={"total_steps": 4})
    assert found[:5] == [2.0, 1.5, 1.0, 0.5, 0.0]


def test_steps_beyond_the_plan_keep_the_last_rate():
    assert rates(20, lr_scheduler="linear")[10:] == [0.0] * 10


def test_an_unknown_setting_is_refused_naming_the_known():
    with pytest.raises(InvalidRequestError, match="num_cycles") as e:
        rates(lr_scheduler="cosine", lr_scheduler_kwargs={"cycles": 2})
    assert e.value.field == "optimizer.lr_scheduler_kwargs"
