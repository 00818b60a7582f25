"""The MindSpore model computes what the NumPy reference computes."""

import dataclasses

import numpy as np
import pytest

from pangu_sigma.model.graph_inputs import split_inputs
from pangu_sigma.model.layers.attention import chunk_count
from tests.pangu_sigma.model.conftest import CASES, GROUPS, VOCAB
from tests.pangu_sigma.model.model_driver import EOD, make_batch

TOLERANCE = 1e-5


def test_the_lengths_under_test_use_one_two_and_four_attention_chunks():
    assert [chunk_count(CASES[c][1]) for c in ("dense", "dense_2_chunks", "dense_4_chunks")] == [1, 2, 4]


def test_the_batches_under_test_hold_several_documents_and_domains(driven):
    _, batch = driven("rre")
    assert (batch.tokens == EOD).any(1).all()
    assert set(batch.domain) == {0, 1, 2}


@pytest.mark.parametrize("case", [c for c in CASES if "switch_capacity" not in c])
def test_logits_agree_with_the_reference(driven, case):
    model, batch = driven(case)
    expected = model.oracle(batch).logits
    assert np.abs(expected).max() > 3  # the comparison says something
    # A rotation multiplies by rounded sines twice, which shows in single logits.
    tolerance = 4 * TOLERANCE if CASES[case][0].get("position") == "rope" else TOLERANCE
    np.testing.assert_allclose(model.logits(batch), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_losses_agree_with_the_reference(driven, noise, case):
    model, batch = driven(case)
    noise = noise if "switch_capacity" in case else None
    objective, by_sample, auxiliary, _, _ = model.train(batch, scale=0.7, noise=noise)
    expected = model.oracle(batch, True, noise)
    counted = np.where(batch.weights > 0, expected.losses, 0.0).sum(1)
    np.testing.assert_allclose(by_sample, counted, rtol=TOLERANCE)
    np.testing.assert_allclose(auxiliary, expected.auxiliary, rtol=TOLERANCE, atol=1e-12)
    np.testing.assert_allclose(objective, model.oracle_objective(batch, model.tensors, noise, 0.7), rtol=TOLERANCE)


@pytest.mark.parametrize("case", ["dense", "rre_without_query_layer"])
def test_the_loss_of_single_tokens_agrees_with_the_reference(driven, case):
    model, batch = driven(case)
    expected = model.oracle(batch).losses
    for b, s in [(0, 0), (1, 17), (3, 31)]:
        weights = np.zeros_like(batch.weights)
        weights[b, s] = 1.0
        objective = model.train(dataclasses.replace(batch, weights=weights))[0]
        np.testing.assert_allclose(objective, expected[b, s], rtol=TOLERANCE, atol=TOLERANCE)


def test_capacity_drops_rows_of_random_routed_experts_in_training_and_never_in_evaluation(driven):
    model, batch = driven("rre")
    assert all((e < 0).any() for e in model.oracle(batch, training=True).experts.values())
    for router, chosen in zip(model.routers, model.oracle(batch, training=True).experts.values(), strict=True):
        assigned = router.assign(batch.tokens, batch.domain, 0, batch.samples, True)
        np.testing.assert_array_equal(assigned.reshape(chosen.shape), chosen)
        assert (router.assign(batch.tokens, batch.domain, 0, batch.samples, False) >= 0).all()


@pytest.mark.parametrize("case", ["switch", "switch_capacity"])
def test_a_learned_gate_reports_how_many_rows_of_each_sample_every_expert_took(driven, noise, case):
    model, batch = driven(case)
    noise = noise if "switch_capacity" in case else None
    counts = model.train(batch, noise=noise)[3]
    expected = model.oracle(batch, True, noise).experts
    assert len(counts) == len(expected)
    for rows, chosen in zip(counts, expected.values(), strict=True):
        np.testing.assert_array_equal(rows[:, :-1], [np.bincount(c[c >= 0], minlength=GROUPS.total) for c in chosen])
        np.testing.assert_array_equal(rows[:, -1], (chosen < 0).sum(1))


def test_switch_drops_what_overflows_in_training(driven, noise):
    model, batch = driven("switch_capacity")
    chosen = model.oracle(batch, True, noise).experts["blocks.1"]
    assert 0 < (chosen < 0).mean() < 0.7


def test_all_tokens_may_go_to_one_expert_and_none_is_dropped(driven):
    model, batch = driven("rre_without_query_layer")
    one = dataclasses.replace(
        batch, tokens=np.full_like(batch.tokens, 7), domain=np.zeros(4, int), labels=batch.labels % VOCAB
    )
    flat, _ = model.flat(one, True)
    _, ((routing, _), *_), _ = split_inputs(tuple(flat), model.inputs.bounds)
    sizes = [rows.shape[0] for rows in routing[:-1]]
    assert sorted(sizes) == [0] * GROUPS.total + [4 * 32]
    np.testing.assert_allclose(model.logits(one), model.oracle(one).logits, rtol=TOLERANCE, atol=TOLERANCE)
    objective = model.train(one)[0]
    np.testing.assert_allclose(objective, model.oracle_objective(one, model.tensors), rtol=TOLERANCE)


def test_a_document_does_not_see_the_ones_before_it(driven):
    model, _ = driven("rre")
    batch = make_batch(2, VOCAB, 4, 32, 3)
    tokens = np.where(batch.tokens == EOD, EOD + 1, batch.tokens)
    tokens[:, 11] = EOD
    other = tokens.copy()
    other[:, :11] = (other[:, :11] + 9) % VOCAB
    other[:, :11][other[:, :11] == EOD] = EOD + 1
    first = model.logits(dataclasses.replace(batch, tokens=tokens))
    second = model.logits(dataclasses.replace(batch, tokens=other))
    assert not np.allclose(first[:, :12], second[:, :12])
    np.testing.assert_allclose(first[:, 12:], second[:, 12:], rtol=TOLERANCE, atol=TOLERANCE)
