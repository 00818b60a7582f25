"""Packed examples are computed as if each stood alone, only answers count, and padding reaches no expert."""

import numpy as np
import pytest

from pangu_sigma.data.packed_rows import TokenSequence, packed_row
from pangu_sigma.finetuning.example_rows import (
    ExampleSampler,
    ExampleStream,
    HeldoutExamples,
    NoExamples,
)
from pangu_sigma.finetuning.examples import ExampleSet
from pangu_sigma.model.scoring import Scorer
from pangu_sigma.training.objective import TrainingObjective
from pangu_sigma.training.schedule import scheduled_step
from pangu_sigma.training.trainer import Trainer
from tests.pangu_sigma.training.small_trainer import EOD, LENGTH, VOCAB, small_config, small_model

PAD = 0


def sequence(draw, prompt: int, answer: int) -> TokenSequence:
    ids = draw.integers(EOD + 1, VOCAB, prompt + answer + 1).astype(np.int32)
    ids[-1] = EOD
    return TokenSequence(ids, prompt)


def example_set(count: int, answers: int = 1, name: str = "code") -> ExampleSet:
    draw = np.random.default_rng(1)
    made = [
        tuple(sequence(draw, draw.integers(1, 5), draw.integers(1, 5)) for _ in range(answers)) for _ in range(count)
    ]
    return ExampleSet(name, tuple(made[:-3]), tuple(made[-3:]), 0, 0, "f")


def test_every_example_comes_once_an_epoch_in_another_order():
    examples = example_set(23)
    stream = ExampleStream(examples, LENGTH, PAD, seed=1)
    seen, index, orders = [], 0, []
    for _ in range(2):
        order = []
        while sum(map(len, order)) < sum(len(answers[0].ids) for answers in examples.train):
            tokens, _, padding = stream.sample(index)
            order.append(tokens[0, : int((~padding[0]).sum()) + 1].tolist())
            index += 1
        orders.append([tuple(row) for row in order])
        flat = [token for row in order for token in row]
        seen.append(sorted(map(tuple, np.split(flat, np.flatnonzero(np.array(flat) == EOD) + 1)[:-1])))
    expected = sorted(tuple(answers[0].ids.tolist()) for answers in examples.train)
    assert seen == [expected, expected] and orders[0] != orders[1]
    # Any row can be read without those before it, as a resumed run does.
    np.testing.assert_array_equal(ExampleStream(examples, LENGTH, PAD, 1).sample(index - 1)[0], tokens)


def test_a_pair_is_two_rows_of_its_domain():
    examples = example_set(9, answers=2, name="law")
    streams = [NoExamples("code", LENGTH), ExampleStream(examples, LENGTH, PAD, 1)]
    sampler = ExampleSampler(streams, {"law": 1.0}, 1)
    drawn = sampler.next_batch(3)
    assert drawn.domain.tolist() == [1] * 6 and drawn.sample.tolist() == [0, 0, 1, 1, 2, 2]
    all_pairs = {tuple(map(lambda answer: tuple(answer.ids.tolist()), pair)) for pair in examples.train}
    rows = [
        tuple(row[: int((~padding).sum()) + 1].tolist())
        for row, padding in zip(drawn.tokens, drawn.padding, strict=True)
    ]
    assert {(rows[0], rows[1]), (rows[2], rows[3]), (rows[4], rows[5])} <= all_pairs
    stream = ExampleStream(examples, LENGTH, PAD, 1)
    assert {stream.sample(i)[0].tobytes() for i in range(6)} == {stream.sample(i)[0].tobytes() for i in range(6, 12)}


def test_an_example_in_a_packed_row_has_the_losses_that_it_has_alone():
    draw = np.random.default_rng(2)
    chosen = [sequence(draw, 3, 2), sequence(draw, 2, 3)]
    model = small_model(small_config({"init_std": 0.5}))
    scorer = Scorer(model, 3)
    rows = [packed_row(part, LENGTH, PAD) for part in (chosen, chosen[:1], chosen[1:])]
    losses = scorer.losses(np.stack([row[0] for row in rows]), [0, 0, 0])
    packed, first, second = (losses[i][rows[i][1] > 0] for i in range(3))
    np.testing.assert_allclose(packed, np.concatenate([first, second]), rtol=1e-6)


def test_padding_trains_no_expert():
    draw = np.random.default_rng(3)
    tokens, mask, padding = (part[None] for part in packed_row([sequence(draw, 2, 2)], LENGTH, PAD))
    from pangu_sigma.data.mixture_sampler import Batch

    trainer = Trainer(small_model(small_config(train={"batch_size": 1})), TrainingObjective(auxiliary=False))
    (planned,) = trainer.plan(Batch(tokens, np.array([0], np.int32), np.array([0]), 0, mask, padding))
    assert sum(plan.counts.sum() for plan in planned.plans) == 4 and planned.dropped.sum() == 0
    trainer.step(scheduled_step(trainer.config, 0), [planned])
    record = trainer.take_record()
    assert sum(sum(rows) for rows in record["expert_load"]["blocks.0"].values()) == 4
    assert record["tokens"] == {"code": 3} and record["dropped_share"]["blocks.0"] == {"code": 0.0}


def test_held_out_labels_are_counted_once():
    heldout = HeldoutExamples(example_set(10), LENGTH, PAD)
    _, masks = heldout.batch(0, len(heldout) + 2)
    assert masks.sum() == heldout.tokens > 0 and masks[len(heldout) :].sum() == 0


@pytest.mark.parametrize("prompt", [1, 5])
def test_the_longest_row_has_no_padding(prompt):
    draw = np.random.default_rng(3)
    _, mask, padding = packed_row([sequence(draw, prompt, LENGTH - prompt)], LENGTH, PAD)
    assert not padding.any() and mask.sum() == LENGTH - prompt + 1
