"""The dynamic loss scale of float16."""

from pangu_sigma.training.loss_scale import LossScale
from tests.pangu_sigma.training.small_trainer import small_config


def make(initial: float = 64.0, window: int = 3, factor: float = 2.0) -> LossScale:
    settings = {"initial": initial, "window": window, "factor": factor}
    return LossScale.from_config(small_config(train={"precision": "float16", "loss_scale": settings}))


def test_it_is_one_and_fixed_outside_float16():
    scale = LossScale.from_config(small_config(train={"loss_scale": {"window": 1}}))
    scale.record_success()
    assert scale.value == 1.0 and not scale.record_overflow() and scale.value == 1.0


def test_it_grows_after_a_window_of_clean_steps():
    scale = make()
    values = []
    for _ in range(7):
        scale.record_success()
        values.append(scale.value)
    assert values == [64, 64, 128, 128, 128, 256, 256]


def test_an_overflow_cuts_it_and_begins_the_window_anew():
    scale = make()
    scale.record_success()
    scale.record_success()
    assert scale.record_overflow() and scale.value == 32
    scale.record_success()
    scale.record_success()
    assert scale.value == 32
    scale.record_success()
    assert scale.value == 64


def test_at_its_floor_no_smaller_scale_can_help():
    scale = make(initial=3.0)
    assert scale.record_overflow() and scale.value == 1.5
    assert scale.record_overflow() and scale.value == 1.0
    assert not scale.record_overflow() and scale.value == 1.0


def test_its_state_continues():
    first, second = make(), make()
    first.record_success()
    first.record_success()
    second.restore(first.state())
    first.record_success()
    second.record_success()
    assert second == first and second.value == 128
