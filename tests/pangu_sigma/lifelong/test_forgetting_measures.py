"""The lifelong measures on matrices whose values are known by hand."""

import numpy as np
import pytest

from pangu_sigma.lifelong.forgetting_measures import (
    backward_transfer,
    final_loss,
    forgetting,
    forward_transfer,
    learned_loss,
)

# Three stages, each brings one domain; losses in nats per token.
LOSSES = np.array(
    [
        [2.0, 5.0, 6.0],
        [2.5, 3.0, 5.5],
        [2.25, 3.75, 1.0],
    ]
)
UNTRAINED = np.array([8.0, 8.0, 7.0])
IN_ORDER = [0, 1, 2]


def test_backward_transfer_is_the_change_since_a_domain_was_learned():
    measure = backward_transfer(LOSSES, IN_ORDER)
    assert measure.by_domain == {0: -0.25, 1: -0.75} and measure.mean == -0.5


def test_forgetting_is_measured_from_the_best_that_ever_was():
    better = LOSSES.copy()
    better[1, 0] = 1.5  # domain 0 profited from stage 1, and lost it again
    measure = forgetting(better, IN_ORDER)
    assert measure.by_domain == {0: 0.75, 1: 0.75} and measure.mean == 0.75
    assert backward_transfer(better, IN_ORDER).by_domain[0] == -0.25


def test_forgetting_may_be_negative_where_the_end_is_the_best():
    improving = np.array([[2.0, 5.0], [1.5, 3.0]])
    assert forgetting(improving, [0, 1]).mean == -0.5 == -backward_transfer(improving, [0, 1]).mean


def test_nothing_changed_is_exactly_nothing_forgotten():
    kept = np.array([[2.1, 5.0], [2.1, 3.0]])
    assert forgetting(kept, [0, 1]).mean == 0.0 == backward_transfer(kept, [0, 1]).mean


def test_forward_transfer_is_the_gain_before_a_domain_is_learned():
    measure = forward_transfer(LOSSES, UNTRAINED, IN_ORDER)
    assert measure.by_domain == {1: 3.0, 2: 1.5} and measure.mean == 2.25


def test_what_was_learned_and_what_is_left_of_it():
    assert learned_loss(LOSSES, IN_ORDER).mean == pytest.approx((2.0 + 3.0 + 1.0) / 3)
    assert final_loss(LOSSES, IN_ORDER).mean == pytest.approx((2.25 + 3.75 + 1.0) / 3)


def test_one_stage_alone_has_nothing_before_or_after_it():
    joint = np.array([[2.0, 3.0]])
    for measure in (backward_transfer(joint, [0, 0]), forgetting(joint, [0, 0])):
        assert measure.mean is None and measure.by_domain == {}
    assert forward_transfer(joint, np.array([8.0, 8.0]), [0, 0]).mean is None
    assert final_loss(joint, [0, 0]).mean == 2.5


def test_several_domains_of_one_stage_and_one_that_nobody_learns():
    losses = np.array([[2.0, 3.0, 6.0, 9.0], [2.5, 2.0, 4.0, 8.0]])
    learned = [0, 0, 1, None]
    assert backward_transfer(losses, learned).by_domain == {0: -0.5, 1: 1.0}
    assert forgetting(losses, learned).by_domain == {0: 0.5, 1: -1.0}
    assert forward_transfer(losses, np.full(4, 8.0), learned).by_domain == {2: 2.0}
    assert final_loss(losses, learned).by_domain == {0: 2.5, 1: 2.0, 2: 4.0}


def test_a_domain_that_returns_counts_from_its_first_time():
    losses = np.array([[2.0, 5.0], [3.0, 1.0], [1.0, 2.0]])  # domain 0, domain 1, domain 0 again
    assert backward_transfer(losses, [0, 1]).by_domain == {0: 1.0, 1: -1.0}
    assert forgetting(losses, [0, 1]).by_domain == {0: -1.0, 1: 1.0}
