"""Random Routed Experts on the host: domain -> group, table -> expert; capacity; resampling."""

import math

import numpy as np
import pytest

from parallel.operator_layout import Layout
from rre.dispatch.dispatch_plan import DROPPED
from rre.router_specs import ROUTER_SPECS
from rre.routers import ExpertGroups, RouterOptions, build_router
from rre.routers.table_router import TableRouter
from rre.routing_tables import draw_table

VOCAB, LENGTH = 200, 64
GROUPS = ExpertGroups(("code", "law", "poems"), (4, 2, 5))
TABLES = {
    name: draw_table("uniform", 1, "blocks.2", name, VOCAB, size, None)
    for name, size in zip(GROUPS.names, GROUPS.sizes, strict=True)
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (6, LENGTH)).astype(np.int32)
DOMAIN = np.array([2, 0, 1, 1, 2, 0])
SAMPLES = np.array([11, 5, 8, 3, 21, 0])


def router(tables=TABLES, layer: int = 2, seed: int = 4, resample: bool = False, **options) -> TableRouter:
    settings = {"resample": resample}
    spec, layout = ROUTER_SPECS["rre"], Layout()
    return build_router(
        RouterOptions(spec, GROUPS, 8, LENGTH, layout, layer, seed, settings=settings, tables=tables, **options)
    )


def assign(of: TableRouter, which=slice(None), step: int = 3, training: bool = True) -> np.ndarray:
    ids = of.assign(TOKENS[which], DOMAIN[which], step, SAMPLES[which], training)
    assert ids.shape == (TOKENS[which].size, 1)
    return ids.reshape(-1, LENGTH)


def test_groups_know_their_places_on_the_expert_axis():
    assert GROUPS.total == 11
    assert GROUPS.offsets.tolist() == [0, 4, 6]
    assert GROUPS.of("law") == slice(4, 6)


@pytest.mark.parametrize("training", [True, False])
def test_a_token_goes_where_its_domains_table_says(training):
    ids = assign(router(), training=training)
    for b, domain in enumerate(DOMAIN):
        name = GROUPS.names[domain]
        group = GROUPS.of(name)
        np.testing.assert_array_equal(ids[b], group.start + TABLES[name][TOKENS[b]])
        assert ids[b].min() >= group.start and ids[b].max() < group.stop


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_capacity_is_per_sample_and_domain_whatever_else_is_in_the_batch(factor):
    limited = router(capacity_factor=factor)
    ids, free = assign(limited), assign(router())
    for b, domain in enumerate(DOMAIN):
        room = math.ceil(factor * LENGTH / GROUPS.sizes[domain])
        taken = np.bincount(ids[b][ids[b] != DROPPED], minlength=GROUPS.total)
        np.testing.assert_array_equal(taken, np.minimum(np.bincount(free[b], minlength=GROUPS.total), room))
        np.testing.assert_array_equal(assign(limited, slice(b, b + 1))[0], ids[b])
    assert (ids == DROPPED).any() or factor > 1


def test_capacity_takes_the_earlier_tokens_and_evaluation_drops_none():
    same = TABLES["law"].copy()
    same[:] = 1
    one = router(TABLES | {"law": same}, capacity_factor=1.0)
    ids = one.assign(TOKENS[2:3], DOMAIN[2:3], 0, SAMPLES[2:3], True).reshape(-1)
    np.testing.assert_array_equal(ids, [5] * (LENGTH // 2) + [DROPPED] * (LENGTH // 2))
    assert (one.assign(TOKENS[2:3], DOMAIN[2:3], 0, SAMPLES[2:3], False) == 5).all()


def test_resampling_is_counted_by_step_and_sample_and_independent_of_the_place_in_the_batch():
    resampling = router(resample=True)
    ids = assign(resampling)
    np.testing.assert_array_equal(ids, assign(router(resample=True)))
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(assign(resampling, order), ids[order])
    np.testing.assert_array_equal(assign(resampling, [4])[0], ids[4])
    assert not np.array_equal(assign(resampling, step=4), ids)
    assert not np.array_equal(assign(router(layer=3, resample=True)), ids)
    assert not np.array_equal(assign(router(seed=5, resample=True)), ids)


def test_resampling_draws_every_occurrence_uniformly_from_the_domains_group():
    resampling = router(resample=True)
    drawn = np.stack([assign(resampling, step=step) for step in range(60)])
    for b, domain in enumerate(DOMAIN):
        group = GROUPS.of(GROUPS.names[domain])
        shares = np.bincount(drawn[:, b].reshape(-1), minlength=GROUPS.total) / drawn[:, b].size
        assert shares[group].sum() == 1.0
        assert np.abs(shares[group] - 1 / GROUPS.sizes[domain]).max() < 0.05
    # Two occurrences of one id in one sample do not have to meet.
    once = TOKENS[0] == np.bincount(TOKENS[0]).argmax()
    assert len(np.unique(drawn[:, 0, once])) == GROUPS.sizes[2]


def test_evaluation_uses_the_table_even_where_training_resamples():
    np.testing.assert_array_equal(assign(router(resample=True), training=False), assign(router()))
