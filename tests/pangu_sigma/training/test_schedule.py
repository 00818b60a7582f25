"""Learning rate and phases by step."""

import math

import pytest

from pangu_sigma.config import config_from_dict
from pangu_sigma.config.domain_edits import FollowUpTraining, add_domain
from pangu_sigma.training.schedule import domain_weights, learning_rate, phase_at, same_rates, scheduled_step
from tests.pangu_sigma.training.small_trainer import small_config

PEAK = 1e-2


def rates(**schedule) -> list[float]:
    config = small_config(schedule={"min_lr_ratio": 0.1, **schedule})
    return [learning_rate(config, step) / PEAK for step in range(100)]


def test_the_warm_up_grows_by_equal_steps_to_the_peak():
    for kind in ("cosine", "linear", "constant"):
        assert rates(kind=kind, warmup_steps=4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_without_warm_up_the_first_step_has_the_peak():
    assert rates(kind="cosine")[0] == 1.0


def test_a_constant_rate_stays():
    assert set(rates(kind="constant", warmup_steps=4)[3:]) == {1.0}


def test_the_cosine_follows_its_formula_and_then_stays_at_its_end():
    curve = rates(kind="cosine", warmup_steps=10, decay_steps=60)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * done / 50)) / 2 for done in range(50)]
    assert curve[10:60] == pytest.approx(expected)
    assert curve[60:] == pytest.approx([0.1] * 40)


def test_the_line_falls_by_equal_steps_to_its_end():
    curve = rates(kind="linear", warmup_steps=10, decay_steps=60)
    assert curve[10:60] == pytest.approx([1.0 - 0.9 * done / 50 for done in range(50)])
    assert curve[60:] == pytest.approx([0.1] * 40)


def test_a_decay_without_an_end_of_its_own_ends_with_the_run():
    assert rates(kind="linear", min_lr_ratio=0.0)[99] == pytest.approx(0.01)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_anneal_falls_by_equal_steps_from_where_the_plan_stands_to_nothing(kind):
    curve = rates(kind=kind, warmup_steps=10, anneal_steps=20)
    # The decay before it ends where the anneal begins.
    start = 1.0 if kind == "constant" else 0.1
    assert curve[80:] == pytest.approx([start * (1 - step / 20) for step in range(20)])
    assert curve[79] == pytest.approx(start, rel=0.2)
    assert curve[10] == 1.0


def test_an_anneal_that_interrupts_a_decay_begins_at_its_rate():
    plain, curve = (rates(kind="cosine", decay_steps=100, anneal_steps=n) for n in (0, 10))
    assert curve[:91] == plain[:91] and curve[95] == pytest.approx(plain[90] / 2)


def test_a_warm_up_as_long_as_the_decay_divides_by_nothing():
    assert rates(kind="cosine", warmup_steps=10, decay_steps=10)[9:11] == pytest.approx([1.0, 1.0])


def test_a_run_without_phases_trains_everything_by_the_domains_weights():
    phase = phase_at(small_config(), 50)
    assert phase.shared and phase.domains == {"code", "law", "poems"}
    assert domain_weights(small_config(), 50) == {"code": 1.0, "law": 1.0, "poems": 1.0}


def test_phases_follow_one_another_and_the_last_takes_what_is_left():
    phases = [
        {"steps": 10, "weights": {"code": 2.0}, "domains": ["code"]},
        {"steps": 20, "shared": False, "domains": ["law", "poems"]},
        {},
    ]
    config = small_config(train={"phases": phases})
    assert [phase_at(config, step).index for step in (0, 9, 10, 29, 30, 99)] == [0, 0, 1, 1, 2, 2]
    first, second, third = (phase_at(config, step) for step in (0, 10, 30))
    assert (first.shared, first.domains) == (True, {"code"})
    assert (second.shared, second.domains) == (False, {"law", "poems"})
    assert (third.shared, third.domains) == (True, {"code", "law", "poems"})
    assert domain_weights(config, 9) == {"code": 2.0}
    assert domain_weights(config, 10) == domain_weights(config, 30) == {"code": 1.0, "law": 1.0, "poems": 1.0}


def test_after_skipped_steps_the_batchs_step_decides_the_phase_and_the_optimizers_the_rate():
    config = small_config(train={"phases": [{"steps": 10}, {}]}, schedule={"kind": "linear", "warmup_steps": 20})
    step = scheduled_step(config, 8, batch_step=11)
    assert (step.index, step.phase.index, step.learning_rate) == (8, 1, learning_rate(config, 8))
    assert scheduled_step(config, 8).phase.index == 0


def test_batches_read_ahead_of_the_end_belong_to_the_last_phase():
    assert phase_at(small_config(train={"phases": [{"steps": 10}, {}]}), 105).index == 1


def test_a_phase_that_restarts_has_the_whole_schedule_in_its_own_steps():
    phases = [{"steps": 40}, {"steps": 20, "restart": True}, {}]
    config = small_config(schedule={"kind": "linear", "warmup_steps": 4, "decay_steps": 40}, train={"phases": phases})
    alone = small_config(schedule={"kind": "linear", "warmup_steps": 4, "decay_steps": 20})
    assert [learning_rate(config, step) for step in range(40)] == [
        learning_rate(small_config(schedule={"kind": "linear", "warmup_steps": 4, "decay_steps": 40}), step)
        for step in range(40)
    ]
    assert [learning_rate(config, 40 + step) for step in range(60)] == [learning_rate(alone, s) for s in range(60)]


@pytest.mark.parametrize(("written", "warmup"), [({}, 2), ({"warmup_steps": 100}, 50)])
def test_a_follow_up_warms_up_in_a_twentieth_of_its_steps_unless_the_warm_up_was_written(written, warmup):
    run = small_config(
        optimizer={"learning_rate": None}, schedule={"kind": "cosine", **written}, train={"steps": 2000}
    )
    assert run.schedule.warmup_steps == written.get("warmup_steps", 200)
    values = run.to_dict()  # as a run stores it
    add_domain(values, {"name": "news", "data": ["unused.txt"]}, 2000, FollowUpTraining("news", 50))
    config = config_from_dict(values)
    curve = [learning_rate(config, 2000 + step) for step in range(50)]
    assert curve.index(max(curve)) == warmup - 1 and len(set(curve[:warmup])) == warmup
    assert same_rates(config, run, 2000)


def test_two_schedules_are_compared_as_if_every_step_were():
    schedules = [
        {"schedule": {"kind": kind, "warmup_steps": warmup, "anneal_steps": anneal}, "train": {"steps": steps}}
        for kind, warmup, anneal, steps in (
            ("cosine", 3, 0, 20), ("cosine", 3, 0, 30), ("linear", 3, 0, 20), ("linear", 3, 5, 20),
            ("constant", 3, 0, 20), ("constant", 3, 0, 30), ("constant", 3, 4, 20), ("constant", 0, 0, 20),
        )
    ]  # fmt: skip
    configs = [small_config(**schedule) for schedule in schedules]
    for one in configs:
        for other in configs:
            for steps in range(20):
                alike = all(learning_rate(one, step) == learning_rate(other, step) for step in range(steps))
                assert same_rates(one, other, steps) == alike
