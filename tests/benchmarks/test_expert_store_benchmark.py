"""The expert-store benchmark's own parts: what rotates, what the dense baseline computes, what a page says."""

import numpy as np
import pytest
from mindspore import Tensor

from benchmarks.expert_store import cases, page
from benchmarks.expert_store_work import Rotation, Work, every_expert_store
from rre.adamw import AdamWHyperparameters, update_in_place
from rre.store import HostStore

HYPER = AdamWHyperparameters(learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-6, weight_decay=0.3)
SHAPES = {"blocks.1": {"up.weight": (3, 5), "up.bias": (5,)}}


@pytest.mark.parametrize("domains", [4, 5, 40])
def test_every_step_has_other_domains_than_the_one_before_and_all_come(domains):
    work = Work("host", domains, 1, 1, batch=4, domains_per_step=2, steps=1, warmup=0)
    rotation = Rotation(work)
    steps = [set(rotation.next_batch(4).domain.tolist()) for _ in range(100)]
    assert all(len(chosen) == 2 for chosen in steps)
    assert all(not first & second for first, second in zip(steps, steps[1:], strict=False))
    assert set.union(*steps) == set(range(domains))


def test_the_baseline_updates_every_expert_by_its_gradient_or_by_zero():
    class Model:
        store = HostStore(SHAPES, {"blocks.1": 6})

    draw = np.random.default_rng(0)
    for _, _, _, table in Model.store.tables():
        table[...] = draw.random(table.shape)
    expected = {(kind, name): table.copy() for kind, _, name, table in Model.store.tables()}
    store = every_expert_store(Model)
    for step, touched in enumerate(([1, 4], [0], [], [5])):
        gradients = {e: [draw.standard_normal(s).astype("f4") for s in SHAPES["blocks.1"].values()] for e in touched}
        for expert, expert_gradients in gradients.items():
            store.apply("blocks.1", expert, [Tensor(g) for g in expert_gradients], HYPER, 0.5)
        store.rest(HYPER)
        store.flush()
        for expert in range(6):
            for tensor_index, (name, shape) in enumerate(SHAPES["blocks.1"].items()):
                rows = [expected[kind, name][expert] for kind in ("weight", "m", "v")]
                gradient = gradients[expert][tensor_index] if expert in gradients else np.zeros(shape, np.float32)
                update_in_place(*rows, gradient, HYPER, step + 1, 0.5, name.endswith("weight"))
    for kind, _, name, table in store.tables():
        np.testing.assert_array_equal(table, expected[kind, name])
    assert store.steps["blocks.1"].tolist() == [4] * 6
    store.close()


def test_a_page_without_results_says_nothing_about_them():
    assert page({}).startswith("# Expert stores") and "##" not in page({})
    assert {"stored", "throughput", "disk", "killed"} == set(cases())
