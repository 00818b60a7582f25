"""Disk store: the same bits as the host and device stores, within its bound of resident memory, without leftovers."""

import resource

import numpy as np
import pytest
from mindspore import Tensor

from rre.adamw import AdamWHyperparameters
from rre.feed_forward_spec import FeedForwardSpec
from rre.store import DeviceStore, DiskStore, ExpertStore, HostStore
from rre.store.disk_store import PAGE, StoreFull

LAYER_NAMES = ("blocks.1", "query_layer")
SHAPES = {layer_name: FeedForwardSpec("fast_gelu").shapes(32, 48) for layer_name in LAYER_NAMES} | {
    "embedding": {"word": (10, 4)}
}
EXPERTS = {"blocks.1": 12, "query_layer": 12, "embedding": 3}
RECORD = -(-3 * 4 * (2 * 32 * 48 + 32 + 48) // PAGE) * PAGE
STD = {"up.weight": 0.02, "down.weight": 0.01, "word": 0.1}
HYPER = AdamWHyperparameters(learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-6, weight_decay=0.3)


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
            store.start_step()
            for layer_name in LAYER_NAMES:
                chosen = np.unique(draw.integers(0, 12, 2))
                store.prefetch(layer_name, chosen)
                weights = [t.asnumpy() for t in store.fetch(layer_name, chosen)]
                for index, expert in enumerate(chosen):
                    expert_weights = weights[4 * index : 4 * index + 4]
                    touched[layer_name, int(expert)] = [
                        Tensor(w + draw.standard_normal(w.shape).astype("f4")) for w in expert_weights
                    ]
        for (layer_name, expert), gradients in touched.items():
            store.apply(layer_name, expert, gradients, HYPER, 0.5)


def contents(store: ExpertStore) -> dict[tuple, bytes]:
    store.flush()
    tables = {
        (kind, layer_name, name): store.read(kind, layer_name, name, slice(0, EXPERTS[layer_name])).tobytes()
        for kind, layer_name, name, _ in store.tables()
    }
    return tables | {("steps", layer_name, ""): steps.tobytes() for layer_name, steps in store.steps.items()}


def test_all_stores_hold_the_same_bits_after_training(tmp_path):
    tables = {}
    for kind in ("host", "device", "disk"):
        store = make(kind, tmp_path)
        train(store, 30)
        tables[kind] = contents(store)
        store.close()
    assert tables["host"] == tables["device"] == tables["disk"]


def test_the_disk_store_keeps_to_its_bound_and_counts_what_it_moves(tmp_path):
    store = make("disk", tmp_path, resident=5 * RECORD)
    store.stats.take()
    draw, most = np.random.default_rng(1), 0
    for _ in range(20):
        store.start_step()
        for layer_name in LAYER_NAMES:
            store.fetch(layer_name, draw.integers(0, 12, 2))
            most = max(most, store.mapped_bytes)
    assert 0 < most <= 5 * RECORD
    moved = store.stats.take()
    assert moved["bytes_read"] % RECORD == 0 and 0 < moved["hits"] < moved["fetched"]
    assert moved["bytes_read"] == (moved["fetched"] - moved["hits"]) * RECORD
    store.close()


def let_go(store) -> None:
    store.start_step()
    for key in list(store._resident):
        store._evict(key)


def test_what_was_let_go_is_on_the_disk(tmp_path):
    store = make("disk", tmp_path)
    train(store, 5)
    before = contents(store)
    let_go(store)
    assert store.mapped_bytes == 0 and contents(store) == before
    table = np.fromfile(tmp_path / "experts" / "blocks.1.table", np.float32).reshape(12, -1)
    np.testing.assert_array_equal(table[3, : 32 * 48].reshape(32, 48), store.table("blocks.1", "up.weight")[3])
    store.close()


def test_a_prefetched_expert_is_a_hit(tmp_path):
    store = make("disk", tmp_path)
    let_go(store)
    store.stats.take()
    store.prefetch("blocks.1", [4])
    store._reader.submit(int).result()  # the one reading thread is done with what was asked before
    store.start_step()
    store.fetch("blocks.1", [4, 5])
    moved = store.stats.take()
    assert (moved["fetched"], moved["hits"]) == (2, 1)
    store.close()


def read_ahead(store: DiskStore, *experts: int) -> None:
    store.prefetch("blocks.1", experts)
    store._reader.submit(int).result()  # the one reading thread is done with what was asked before


def test_reading_ahead_takes_no_room_from_what_an_earlier_step_waits_for(tmp_path):
    store = make("disk", tmp_path, resident=4 * RECORD)
    store.start_step()
    store.fetch("blocks.1", [0, 1])
    read_ahead(store, 2, 3)
    read_ahead(store, 4, 5)  # no room: 0 and 1 are at work, 2 and 3 are awaited
    store.start_step()
    store.stats.take()
    store.fetch("blocks.1", [2, 3])
    assert store.stats.take()["hits"] == 2
    read_ahead(store, 6, 7)  # 0 and 1 have served
    store.start_step()
    store.fetch("blocks.1", [4, 5])
    moved = store.stats.take()
    assert (moved["fetched"], moved["hits"]) == (2, 0) and store.mapped_bytes <= 4 * RECORD
    store.close()


def test_micro_batches_that_exceed_the_bound_together_are_updated_in_parts(tmp_path):
    stores = {kind: make(kind, tmp_path, resident=3 * RECORD) for kind in ("disk", "host")}
    for store in stores.values():
        gradients = {}
        for first in range(0, 12, 3):
            store.start_step()
            weights = store.fetch("blocks.1", range(first, first + 3))
            for index in range(3):
                gradients[first + index] = [Tensor(t.asnumpy() * 0.5) for t in weights[4 * index : 4 * index + 4]]
        for expert, expert_weights in gradients.items():
            store.apply("blocks.1", expert, expert_weights, HYPER)
    assert stores["disk"].mapped_bytes <= 3 * RECORD
    assert contents(stores["disk"]) == contents(stores["host"])
    for store in stores.values():
        store.close()


@pytest.mark.parametrize("resident", [3, 5, 8])
def test_reading_ahead_beside_updates_changes_no_bit(tmp_path, resident):
    tables = []
    for kind in ("disk", "host"):
        store = make(kind, tmp_path, resident=resident * RECORD)
        draw = np.random.default_rng(5)
        plans = [draw.choice(12, 3, replace=False) for _ in range(60)]
        store.prefetch("blocks.1", plans[0])
        for step, chosen in enumerate(plans):
            store.start_step()
            weights = store.fetch("blocks.1", chosen)
            if step + 1 < len(plans):
                store.prefetch("blocks.1", plans[step + 1])  # the reading thread lets go and reads while updates run
            gradients = [Tensor(np.sin(t.asnumpy() * 100)) for t in weights]
            for index, expert in enumerate(chosen):
                store.apply("blocks.1", int(expert), gradients[4 * index : 4 * index + 4], HYPER)
        tables.append(contents(store))
        store.close()
    assert tables[0] == tables[1]


def test_what_is_written_past_the_map_shows_in_it_and_the_other_way_round(tmp_path):
    store = make("disk", tmp_path)
    store.start_step()
    seen = store.fetch("blocks.1", [4])[0]
    store.write("weight", "blocks.1", "up.weight", slice(3, 6), np.full((3, 32, 48), 7, np.float32))
    assert (seen.asnumpy() == 7).all() and (store.table("blocks.1", "up.weight")[3:6] == 7).all()
    store.table("blocks.1", "up.bias")[5] = 9
    assert (store.read("weight", "blocks.1", "up.bias", slice(5, 6)) == 9).all()
    let_go(store)
    assert (store.read("weight", "blocks.1", "up.weight", slice(3, 6)) == 7).all()
    store.close()


def test_tables_that_do_not_fit_leave_nothing_behind(tmp_path):
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * RECORD, allowed[1]))
    try:
        with pytest.raises(OSError):
            make("disk", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert list(tmp_path.iterdir()) == []


def test_the_working_copy_goes_with_the_store_and_a_killed_ones_with_the_next(tmp_path):
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "blocks.99.table").write_bytes(b"left")
    store = make("disk", tmp_path)
    assert {p.name for p in (tmp_path / "experts").iterdir()} == {"blocks.1.table", "query_layer.table"}
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_needs_more_than_the_bound_is_refused(tmp_path):
    store = make("disk", tmp_path, resident=3 * RECORD)
    store.start_step()
    store.prefetch("blocks.1", range(6))  # reading ahead stops at the bound and says nothing
    with pytest.raises(StoreFull, match=r"experts\.resident_gib"):
        store.fetch("blocks.1", range(4))
    store.close()


def test_the_files_are_whole_so_that_a_full_disk_shows_at_once(tmp_path):
    store = make("disk", tmp_path)
    status = (tmp_path / "experts" / "query_layer.table").stat()
    assert status.st_size == 12 * RECORD and status.st_blocks * 512 >= status.st_size
    store.close()
