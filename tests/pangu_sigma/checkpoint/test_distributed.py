"""Several writers of one checkpoint: the bytes of one, nothing left behind when one of them fails.

The ranks are threads here that hand each other arrays in memory; `tests/pangu_sigma/training` does it with processes.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pangu_sigma.checkpoint import CheckpointContents, CheckpointError, LazyTensor, StoredTensors, open_checkpoint
from pangu_sigma.checkpoint import distributed as distributed_save
from pangu_sigma.checkpoint.distributed import ShardedTensor, TensorShard, save_distributed
from parallel.comm.processes import Processes
from parallel.mesh import Mesh


class GatherBarrier:
    """What the threads of a job gather through: a slot for each rank and a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)


class ThreadRank(Processes):
    """A rank as a thread."""

    def __init__(self, gather_barrier: GatherBarrier, rank: int) -> None:
        super().__init__(Mesh(data=gather_barrier.size), rank)
        self.gather_barrier = gather_barrier

    def gather(self, values: np.ndarray) -> np.ndarray:
        self.gather_barrier.slots[self.rank] = values.copy()
        self.gather_barrier.barrier.wait()
        gathered = np.stack(self.gather_barrier.slots)
        self.gather_barrier.barrier.wait()
        return gathered


def shards_of(tensors: dict[str, np.ndarray], rank: int, size: int) -> dict[str, ShardedTensor]:
    """Domains' tensors sharded along their first axis as evenly as it goes, the others dealt out whole."""
    sharded = {}
    for turn, (name, array) in enumerate(sorted(tensors.items())):
        if name.startswith("domains."):
            begin, end = (len(array) * r // size for r in (rank, rank + 1))
            rows = array[begin:end]
            data = LazyTensor(rows.shape, rows.dtype, lambda rows=rows: rows)
            local_shards = (TensorShard((begin,) + (0,) * (array.ndim - 1), data),) if end > begin else ()
            sharded[name] = ShardedTensor(array.shape, array.dtype, local_shards)
        else:
            sharded[name] = ShardedTensor.unsharded(array, turn % size == rank)
    return sharded


def save_with_ranks(size: int, run, step: int, tensors, rest: tuple[CheckpointContents, dict]) -> list:
    """What `save_distributed` returned or raised on every rank."""
    gather_barrier = GatherBarrier(size)
    contents, how = replace(rest[0], step=step), rest[1]

    def work(rank: int):
        try:
            return save_distributed(
                ThreadRank(gather_barrier, rank), run, contents, shards_of(tensors, rank, size), **how
            )
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, range(size)))


@pytest.fixture
def rest(save, monkeypatch) -> tuple[CheckpointContents, dict]:
    """What a save takes beside tensors, as this folder's other tests have it."""
    caught: list = []

    def catch(run, contents, tensors, **how):
        caught.append((contents, how))

    with monkeypatch.context() as patch:
        patch.setitem(save.__globals__, "save_checkpoint", catch)
        save(None, 7, {})
    return caught[0]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_writers_writes_the_bytes_of_one(tmp_path, save, tensors, rest, size):
    rest[1]["max_shard_bytes"] = 3000
    alone = save(tmp_path / "alone", 7, tensors, max_shard_bytes=3000).path
    results = save_with_ranks(size, tmp_path / "together", 7, tensors, rest)
    assert len({result.path for result in results}) == 1
    files = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(results[0].path) for p in results[0].path.rglob("*") if p.is_file())
    for file in files:
        assert (alone / file).read_bytes() == (results[0].path / file).read_bytes(), file


def test_an_unchanged_file_is_the_previous_checkpoints(tmp_path, tensors, rest):
    first = save_with_ranks(2, tmp_path, 7, tensors, rest)[0]
    changed = {**tensors, "domains.law.blocks.2.experts.up.bias": tensors["domains.law.blocks.2.experts.up.bias"] + 1}
    second = save_with_ranks(2, tmp_path, 8, changed, rest)[0]
    assert (second.path / "domains/code.safetensors").samefile(first.path / "domains/code.safetensors")
    assert not (second.path / "domains/law.safetensors").samefile(first.path / "domains/law.safetensors")
    assert second.bytes_linked > 0
    open_checkpoint(second.path).verify()


def test_a_disk_that_is_full_for_one_writer_fails_all_and_leaves_the_last_checkpoint(
    tmp_path, save, tensors, rest, monkeypatch
):
    kept = save(tmp_path, 6, tensors).path
    write, writers = distributed_save._write_at, []

    def full(handle, data, offset):
        # The first thread that comes here writes on, every other one meets a full disk.
        if threading.get_ident() not in writers:
            writers.append(threading.get_ident())
        if threading.get_ident() != writers[0]:
            raise OSError(28, "No space left on device")
        return write(handle, data, offset)

    monkeypatch.setattr(distributed_save, "_write_at", full)
    results = save_with_ranks(3, tmp_path, 7, tensors, rest)
    assert all(isinstance(result, CheckpointError) for result in results)
    assert all("step 7 was not saved" in str(result) and "No space left" in str(result) for result in results)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [kept.name]


def test_rows_of_a_tensor_are_read_without_the_rest(folder, tensors):
    checkpoint = open_checkpoint(folder)
    stored = StoredTensors(checkpoint)
    for name in ("domains.code.blocks.2.experts.up.weight", "domains.code.optimizer.steps.query_layer"):
        assert stored.shape(name) == tensors[name].shape
        np.testing.assert_array_equal(stored.rows(name, range(1, 3)), tensors[name][1:3])
    damaged = folder / "domains" / "code.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    names = [n for n in checkpoint.names(domains=["code"], shared=False, optimizer=False)]
    with pytest.raises(CheckpointError, match="code.safetensors"):
        for name in names:
            checkpoint.load_rows(name, range(1))
