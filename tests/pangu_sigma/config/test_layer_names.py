"""Layers and tensors by arithmetic: as many as a list of them would have, for any number at once."""

from __future__ import annotations

from collections import Counter
from time import perf_counter

import pytest

from pangu_sigma.config import parameter_counts, tensor_shapes
from pangu_sigma.config.config_text import yaml_text
from pangu_sigma.config.layer_names import LayerNames
from pangu_sigma.config.parameter_counts import counted_tensors
from pangu_sigma.errors import UserError
from pangu_sigma.plan.cluster_plan import plan
from pangu_sigma.plan.hardware import Hardware
from pangu_sigma.plan.memory_estimate import device_bytes, stage_bytes

PATTERNS = (
    ["model.sparse.layers=3"],
    ["model.sparse.layers=3", "model.sparse.include_query_layer=true"],
    ["model.sparse.layers=3", "model.query_layer=none"],
    ["model.sparse.pattern=every_other"],
    ["model.sparse.pattern=every", "model.domain_parameters.embedding=own"],
    ["model.sparse={layers: 2, router: switch, shared_expert: true}", "model.head=untied"],
    ["model.top_layer=mixture"],
    ["model.top_layer=mixture", "model.query_layer=none"],
    [],
)
# One key each, and the largest number that the other keys' rules allow it or 10^18.
ABSURD = (
    ["model.layers=1000000000000000000", "model.sparse.layers=100000000000000"],
    ["model.layers=1000000000000000000", "model.sparse.pattern=every_other"],
    ["model.layers=1000000000000000000", "model.sparse.pattern=every"],
    ["model.hidden=10000000", "model.sparse.layers=1"],
    ["model.ffn=1000000000000000000", "model.sparse.layers=1"],
    ["model.vocab_size=2000000000", "model.sparse.layers=1"],
    ["model.positions=100000000000", "data.sequence_length=100000000000"],
    ["train.batch_size=1000000000"],
    ["train.steps=1000000000000000000"],
    ["model.sparse.layers=1", "model.vocab_size=1000000000000000000", "domains.code.experts=1000000000000000000"],
    ["model.sparse={layers: 1, dispatch: capacity, capacity_factor: 1.0e30}"],
    ["parallel.data=1000000000000", "train.batch_size=1000000000000", "evaluate.batch_size=1000000000000"],
    [
        "parallel.expert=1000000000000", "train.batch_size=1000000000000", "evaluate.batch_size=1000000000000",
        "model.sparse.layers=1", "model.vocab_size=2000000000000",
        "domains.code.experts=1000000000000", "domains.docs.experts=1000000000000", "experts.store=host",
    ],
    [
        "parallel.pipeline=1000000000", "model.layers=1000000000", "train.gradient_accumulation_steps=1000000000",
        "train.batch_size=1000000000", "run.device=Ascend", "evaluate.every=0",
    ],
)  # fmt: skip


@pytest.mark.parametrize("has_query_layer", [False, True])
@pytest.mark.parametrize("blocks", [range(0), range(2, 5), range(1, 8, 2)])
def test_names_by_arithmetic_are_those_of_the_list(blocks, has_query_layer):
    names = LayerNames(blocks, has_query_layer)
    listed = [f"blocks.{index}" for index in blocks] + ["query_layer"] * has_query_layer
    assert list(names) == listed and len(names) == len(listed) and names == tuple(listed)
    for index in range(-len(listed), len(listed)):
        assert names[index] == listed[index] and names[index:] == tuple(listed[index:])
    with pytest.raises(IndexError):
        names[len(listed)]
    for name in ("query_layer", "embedding", *(f"blocks.{index}" for index in range(10))):
        assert (name in names) == (name in listed)
    for start in range(10):
        for stop in range(10):
            assert names.blocks_among(range(start, stop)) == len({*blocks} & {*range(start, stop)})


@pytest.mark.parametrize("overrides", PATTERNS, ids=" ".join)
def test_tensors_are_counted_as_they_are_listed(small, overrides):
    config = small("model.layers=7", *overrides)
    counted: Counter[tuple[int, ...]] = Counter()
    for tensor in counted_tensors(config, 4096):
        counted[tensor.shape] += tensor.many
    assert counted == Counter(tensor_shapes(config, 4096).values())
    by_index: Counter[tuple[int, ...]] = Counter()
    outside = sum(tensor.many for tensor in counted_tensors(config, 4096, range(0)))
    for index in range(7):
        for tensor in counted_tensors(config, 4096, range(index, index + 1)):
            by_index[tensor.shape] += tensor.many
    assert sum(by_index.values()) == counted.total() + 6 * outside


@pytest.mark.parametrize("pattern", ["model.sparse.layers=5", "model.sparse.pattern=every_other"])
@pytest.mark.parametrize("stages", [1, 2, 4, 6, 12])
def test_the_fullest_stage_is_found_among_few(small, pattern, stages):
    values = (f"parallel.pipeline={stages}", "run.device=Ascend", "model.layers=12", "evaluate.every=0")
    values += ("train.batch_size=16", "train.gradient_accumulation_steps=16", "model.sparse.dispatch=capacity")
    config = small(*values, pattern)
    every = (stage_bytes(config, 4096, stage) for stage in range(stages))
    assert device_bytes(config, 4096) == max(every, key=lambda by_kind: sum(by_kind.values()))


@pytest.mark.parametrize("overrides", ABSURD, ids=lambda overrides: overrides[0])
def test_a_configuration_and_its_plan_answer_at_once_at_any_size(small, overrides):
    started = perf_counter()
    config = small("model.heads=1", *overrides)
    text = yaml_text(config, config.model.vocab_size or 4096, {})
    report = plan(config, Hardware())
    assert perf_counter() - started < 30
    assert f"{parameter_counts(config, config.model.vocab_size or 4096).total:,}  total" in text
    assert report["device"]["total"] > 0


def test_a_plan_for_a_trillion_devices_answers_at_once(small):
    assert plan(small("train.batch_size=null"), Hardware(), 10**12)["devices"] == 10**12


def test_a_list_of_more_tensors_than_memory_holds_is_refused(small):
    with pytest.raises(UserError, match=r"^model.layers = 1000000000 with 2 domains makes .* tensors"):
        tensor_shapes(small("model.layers=1000000000"), 4096)
