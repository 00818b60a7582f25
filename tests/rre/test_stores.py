"""Host, device and disk stores hold the same numbers, whatever is activated, and the disk store keeps to its bound."""

import numpy as np
import pytest
from mindspore import Tensor

from rre.adamw import AdamWHyper
from rre.experts import expert_shapes
from rre.store import DeviceStore, DiskStore, ExpertStore, HostStore
from rre.store.disk import PAGE, StoreFull

PLACES = ("blocks.1", "query_layer")
SHAPES = {place: expert_shapes(32, 48) for place in PLACES} | {"embedding": {"word": (10, 4)}}
EXPERTS = {"blocks.1": 12, "query_layer": 12, "embedding": 3}
RECORD = -(-3 * 4 * (2 * 32 * 48 + 32 + 48) // PAGE) * PAGE
STD = {"up.weight": 0.02, "down.weight": 0.01, "word": 0.1}
HYPER = AdamWHyper(learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-6, weight_decay=0.3)


def make(kind: str, folder, resident: int = 8 * RECORD) -> ExpertStore:
    if kind == "disk":
        store = DiskStore(SHAPES, EXPERTS, folder / "experts", resident, in_memory=("embedding",))
    else:
        store = {"host": HostStore, "device": DeviceStore}[kind](SHAPES, EXPERTS)
    store.initialise(7, STD)
    return store


def train(store: ExpertStore, steps: int, seed: int = 0) -> None:
    """Another random set of experts every step, now and then in micro-batches of their own."""
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        touched = {}
        for _ in range(int(draw.integers(1, 3))):
            store.begin()
            for place in PLACES:
                chosen = np.unique(draw.integers(0, 12, 2))
                store.prefetch(place, chosen)
                weights = [t.asnumpy() for t in store.fetch(place, chosen)]
                for at, expert in enumerate(chosen):
                    mine = weights[4 * at : 4 * at + 4]
                    touched[place, int(expert)] = [Tensor(w + draw.standard_normal(w.shape).astype("f4")) for w in mine]
        for (place, expert), gradients in touched.items():
            store.apply(place, expert, gradients, HYPER, 0.5)


def contents(store: ExpertStore) -> dict[tuple, bytes]:
    store.settle()
    found = {
        (kind, place, name): store.read(kind, place, name, slice(0, EXPERTS[place])).tobytes()
        for kind, place, name, _ in store.tables()
    }
    return found | {("steps", place, ""): steps.tobytes() for place, steps in store.steps.items()}


def test_all_stores_hold_the_same_bits_after_training(tmp_path):
    found = {}
    for kind in ("host", "device", "disk"):
        store = make(kind, tmp_path)
        train(store, 30)
        found[kind] = contents(store)
        store.close()
    assert found["host"] == found["device"] == found["disk"]


def test_the_disk_store_keeps_to_its_bound_and_counts_what_it_moves(tmp_path):
    store = make("disk", tmp_path, resident=5 * RECORD)
    store.traffic.take()
    draw, most = np.random.default_rng(1), 0
    for _ in range(20):
        store.begin()
        for place in PLACES:
            store.fetch(place, draw.integers(0, 12, 2))
            most = max(most, store.mapped_bytes)
    assert 0 < most <= 5 * RECORD
    moved = store.traffic.take()
    assert moved["bytes_read"] % RECORD == 0 and 0 < moved["hits"] < moved["fetched"]
    assert moved["bytes_read"] == (moved["fetched"] - moved["hits"]) * RECORD
    store.close()


def test_what_was_let_go_is_on_the_disk(tmp_path):
    store = make("disk", tmp_path)
    train(store, 5)
    before = contents(store)
    store.release()
    assert store.mapped_bytes == 0 and contents(store) == before
    table = np.fromfile(tmp_path / "experts" / "blocks.1.table", np.float32).reshape(12, -1)
    np.testing.assert_array_equal(table[3, : 32 * 48].reshape(32, 48), store.table("blocks.1", "up.weight")[3])
    store.close()


def test_a_prefetched_expert_is_a_hit(tmp_path):
    store = make("disk", tmp_path)
    store.release()
    store.traffic.take()
    store.prefetch("blocks.1", [4])
    store._reader.submit(int).result()  # the one reading thread is done with what was asked before
    store.begin()
    store.fetch("blocks.1", [4, 5])
    moved = store.traffic.take()
    assert (moved["fetched"], moved["hits"]) == (2, 1)
    store.close()


def test_a_step_that_needs_more_than_the_bound_is_refused(tmp_path):
    store = make("disk", tmp_path, resident=3 * RECORD)
    store.begin()
    store.prefetch("blocks.1", range(6))  # reading ahead stops at the bound and says nothing
    with pytest.raises(StoreFull, match=r"experts\.resident_gib"):
        store.fetch("blocks.1", range(4))
    store.close()


def test_the_files_are_whole_so_that_a_full_disk_shows_at_once(tmp_path):
    store = make("disk", tmp_path)
    status = (tmp_path / "experts" / "query_layer.table").stat()
    assert status.st_size == 12 * RECORD and status.st_blocks * 512 >= status.st_size
    store.close()
