"""A resumed run says by which keys it is no longer the run without a break, and says nothing where it still is."""

import pytest

from pangu_sigma.config import load_config
from pangu_sigma.training.startup.warnings import not_bit_equal
from tests.pangu_sigma.config.conftest import SMALLEST

PHASES = "train.phases=[{steps: 4, restart: true}, {restart: true}]"


@pytest.fixture
def named(tmp_path):
    """named(before, after, step): what a run says whose overrides were `before`, `step` steps long, and are `after`."""
    file = tmp_path / "small.yaml"
    file.write_text(SMALLEST, encoding="utf-8")
    return lambda before, after, step=5: not_bit_equal(load_config(file, before), load_config(file, after), step)


def test_rounding_is_named_with_both_values(named):
    keys = "train.gradient_accumulation_steps"
    assert named([f"{keys}=2"], [f"{keys}=4"]) == [f"{keys} was 2 and is 4"]
    # Which kernels computed stands in the checkpoint.
    assert named([], ["run.kernels=composed", "train.recompute=true", "evaluate.every=2"]) == []


def test_gates_whose_losses_are_those_of_a_micro_batch_are_named(named):
    gate = ["model.layers=2", "model.sparse.layers=1", "model.sparse.router=switch"]
    fewer = [*gate, "train.gradient_accumulation_steps=2"]
    assert [s for s in named(gate, fewer) if "gates' losses" in s]
    unweighed = "model.sparse.aux_loss_weight=0"
    assert not [s for s in named([*gate, unweighed], [*fewer, unweighed]) if "gates' losses" in s]
    assert not [s for s in named(gate, [*gate, "train.steps=20"]) if "gates' losses" in s]


def test_host_and_disk_compute_alike(named):
    assert named(["experts.store=host"], ["experts.store=disk"]) == []
    assert named([], ["experts.store=disk"]) == ['experts.store was "device" and is "disk"']


def test_a_longer_run_is_named_where_its_schedule_was_another(named):
    assert named([], ["train.steps=20"]) == ["train.steps was 10 and is 20"]
    assert named(["schedule.decay_steps=10"], ["schedule.decay_steps=10", "train.steps=20"]) == []
    constant = ["schedule.kind=constant"]
    assert named(constant, [*constant, "train.steps=20"]) == []


def test_an_anneal_is_named_once_it_has_begun(named):
    annealed = ["schedule.kind=constant", "schedule.anneal_steps=2"]
    assert named(annealed, [*annealed, "train.steps=20"], 9) == []
    assert named(annealed, [*annealed, "train.steps=20"], 10) == ["train.steps was 10 and is 20"]
    assert named(annealed[:1], annealed, 5) == []


def test_a_phase_with_a_decay_of_its_own_is_named_once_it_has_begun(named):
    assert named([PHASES], [PHASES, "train.steps=20"], 4) == []
    assert named([PHASES], [PHASES, "train.steps=20"], 6) == ["train.steps was 10 and is 20"]
    longer = PHASES.replace("4", "6")
    assert named([PHASES], [longer], 3)[0] == "train.phases.0.steps was 4 and is 6"
