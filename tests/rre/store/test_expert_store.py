"""The expert store: AdamW on exactly the experts that were given gradients, and not one bit elsewhere."""

import numpy as np
import pytest
from mindspore import Tensor

from rre.adamw import AdamWHyperparameters
from rre.feed_forward_spec import FeedForwardSpec
from rre.store import DeviceStore

LAYER_NAMES = ("blocks.1", "query_layer")
SHAPES = {layer_name: FeedForwardSpec("fast_gelu").shapes(8, 12) for layer_name in LAYER_NAMES}
STD = {"up.weight": 0.02, "down.weight": 0.01}
HYPER = AdamWHyperparameters(learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-6, weight_decay=0.3)


def make_store(experts: int = 5, seed: int = 3) -> DeviceStore:
    store = DeviceStore(SHAPES, dict.fromkeys(LAYER_NAMES, experts))
    store.initialise(seed, STD)
    return store


def gradients(draw: np.random.Generator, layer_name: str = "blocks.1", size: float = 1.0) -> list[np.ndarray]:
    return [(size * draw.standard_normal(shape)).astype(np.float32) for shape in SHAPES[layer_name].values()]


def apply(store: DeviceStore, expert: int, values: list[np.ndarray], scale: float = 1.0) -> None:
    store.apply("blocks.1", expert, [Tensor(v) for v in values], HYPER, scale)


def snapshot(store: DeviceStore) -> dict[tuple, bytes]:
    """Bytes of every expert's every tensor and count."""
    store.flush()
    contents = {
        (kind, layer_name, name, expert): table[expert].tobytes()
        for kind, layer_name, name, table in store.tables()
        for expert in range(len(table))
    }
    return contents | {
        ("steps", layer_name, "", expert): count.tobytes()
        for layer_name, steps in store.steps.items()
        for expert, count in enumerate(steps)
    }


def test_an_expert_is_updated_as_torchs_adamw_does():
    torch = pytest.importorskip("torch")
    store, draw = make_store(), np.random.default_rng(0)
    start = {name: torch.tensor(store.table("blocks.1", name)[2].copy()) for name in SHAPES["blocks.1"]}
    theirs = {name: torch.nn.Parameter(tensor) for name, tensor in start.items()}
    decayed = [p for name, p in theirs.items() if name.endswith("weight")]
    plain = [p for name, p in theirs.items() if name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-6,
    )  # fmt: skip
    for step in range(20):
        values = gradients(draw, size=10.0 ** draw.uniform(-4, 1))
        scale = 1.0 if step % 2 else 0.25
        for parameter, value in zip(theirs.values(), values, strict=True):
            parameter.grad = torch.tensor(value * np.float32(scale))
        optimizer.step()
        apply(store, 2, values, scale)
        apply(store, 0, gradients(draw))  # a neighbour with its own count
        store.flush()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(
                store.table("blocks.1", name)[2], parameter.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=name
            )
    assert store.steps["blocks.1"].tolist() == [20, 0, 20, 0, 0]


def test_an_expert_that_sleeps_keeps_its_own_bias_correction():
    """Three updates with pauses in between are the same three updates without."""
    often, seldom = make_store(), make_store()
    for step in range(12):
        values = gradients(np.random.default_rng(step))
        if step % 4 == 0:
            apply(often, 1, values)
            apply(seldom, 1, values)
        apply(often, 3, values)
    kept = {key: value for key, value in snapshot(often).items() if key[3] == 1}
    assert kept == {key: value for key, value in snapshot(seldom).items() if key[3] == 1}


def test_everyone_else_keeps_every_bit():
    store = make_store()
    draw = np.random.default_rng(0)
    for expert in range(5):
        apply(store, expert, gradients(draw))  # all have moments, which must not drift
    before = snapshot(store)
    for _ in range(3):
        apply(store, 4, gradients(draw))
    after = snapshot(store)
    changed = {key for key in before if before[key] != after[key]}
    assert {(layer_name, expert) for _, layer_name, _, expert in changed} == {("blocks.1", 4)}
    assert {kind for kind, _, _, _ in changed} == {"weight", "m", "v", "steps"}


def test_a_fetched_expert_is_the_table_also_twice_and_after_updates():
    store = make_store()
    names = list(SHAPES["blocks.1"])
    fetched = store.fetch("blocks.1", [3, 1, 3])
    assert len(fetched) == 3 * len(names)
    apply(store, 3, gradients(np.random.default_rng(1)))
    store.flush()
    for slot, expert in enumerate([3, 1, 3]):
        for index, name in enumerate(names):
            weight = fetched[slot * len(names) + index].asnumpy()
            np.testing.assert_array_equal(weight, store.table("blocks.1", name)[expert])
    full_table = store.full_table("blocks.1", "up.weight").asnumpy()
    np.testing.assert_array_equal(full_table, store.table("blocks.1", "up.weight"))


def test_an_experts_first_weights_do_not_depend_on_how_many_there_are():
    few, many, other = make_store(2), make_store(7), make_store(2, seed=4)
    for layer_name in LAYER_NAMES:
        for name in STD:
            np.testing.assert_array_equal(few.table(layer_name, name), many.table(layer_name, name)[:2])
            assert not np.array_equal(few.table(layer_name, name), other.table(layer_name, name))
    up = many.table("blocks.1", "up.weight")
    assert not np.array_equal(up[0], up[1])
    assert not np.array_equal(up, many.table("query_layer", "up.weight"))
    assert abs(up.std() / 0.02 - 1) < 0.1
    assert not many.table("blocks.1", "up.bias").any()
