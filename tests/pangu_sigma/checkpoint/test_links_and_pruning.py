"""Unchanged files are linked, not written; old checkpoints go; nothing that is kept changes by a byte."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import find_latest, open_checkpoint


def inodes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_only_what_changed_is_written(tmp_path, tensors, save):
    first = save(tmp_path, 1, tensors)
    before = inodes(first.path)
    content = {name: (first.path / name).read_bytes() for name in before}
    tensors["domains.code.blocks.2.experts.up.weight"][1, 2, 3] += 1
    second = save(tmp_path, 2, tensors)
    changed = {"domains/code.safetensors", "state.json", "manifest.json"}
    assert {name for name, inode in inodes(second.path).items() if inode != before[name]} == changed
    sizes = open_checkpoint(second.path).manifest.files
    assert second.bytes_written == sum(sizes[name].bytes for name in changed - {"manifest.json"})
    assert second.bytes_linked == sum(file.bytes for file in sizes.values()) - second.bytes_written
    assert (first.bytes_linked, second.links_refused, second.messages) == (0, 0, ())
    assert {name: (first.path / name).read_bytes() for name in before} == content
    for path in (first.path, second.path):
        open_checkpoint(path).load()
        open_checkpoint(path).verify()


def test_a_new_domain_leaves_every_other_file_alone(tmp_path, make, save):
    two, three = {"code": 4, "law": 2}, {"code": 4, "law": 2, "math": 3}
    tensors = make(groups=two)
    before = inodes(save(tmp_path, 1, tensors).path)
    added = {name: array for name, array in make(5, groups=three).items() if name.startswith("domains.math.")}
    path = save(tmp_path, 2, {**tensors, **added}, groups=three).path
    after = inodes(path)
    assert set(after) - set(before) == {"domains/math.safetensors", "optimizer/domains/math.safetensors"}
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"manifest.json", "probe.safetensors", "state.json"}
    removed = inodes(save(tmp_path, 3, tensors).path)
    assert all(removed[name] == before[name] for name in before if name not in changed)


@pytest.mark.parametrize("change", ["shape", "type", "name", "fewer"])
def test_equal_bytes_under_another_description_are_written(tmp_path, save, change):
    before = save(tmp_path, 1, {"a": np.zeros((2, 6), np.float32), "b": np.ones(3, np.float32)}, groups={}).path
    tensors = {"a": np.zeros((2, 6), np.float32), "b": np.ones(3, np.float32)}
    if change == "shape":
        tensors["a"] = tensors["a"].reshape(6, 2)
    elif change == "type":
        tensors["a"] = tensors["a"].view(np.int32)
    elif change == "name":
        tensors["c"] = tensors.pop("b")
    else:
        del tensors["b"]
    path = save(tmp_path, 2, tensors, groups={}).path
    assert (path / "shared.safetensors").stat().st_ino != (before / "shared.safetensors").stat().st_ino
    loaded = open_checkpoint(path).load()
    assert {n: (a.dtype, a.shape) for n, a in loaded.items()} == {n: (a.dtype, a.shape) for n, a in tensors.items()}


def test_a_refused_link_is_written_and_counted(tmp_path, tensors, save):
    """A file system has a limit of links for a file; a run that long ago froze a domain may reach it."""
    source = save(tmp_path, 1, tensors).path / "domains" / "law.safetensors"
    links = tmp_path / "links"
    links.mkdir()
    try:
        for i in range(70_000):
            os.link(source, links / str(i))
    except OSError as error:
        assert error.errno == errno.EMLINK
    else:
        pytest.skip("this file system has no limit of links within 70,000")
    result = save(tmp_path, 2, tensors)
    shutil.rmtree(links)
    assert result.links_refused == 1 and "1 unchanged files were written again" in result.messages[0]
    open_checkpoint(result.path).verify()


def test_nothing_is_linked_to_a_damaged_checkpoint(tmp_path, tensors, save):
    first = save(tmp_path, 1, tensors).path
    os.truncate(first / "domains/law.safetensors", 10)
    result = save(tmp_path, 2, tensors)
    assert result.bytes_linked == 0
    assert len(result.messages) == 1 and str(first / "domains/law.safetensors") in result.messages[0]
    open_checkpoint(result.path).verify()


def test_the_newest_are_kept(tmp_path, make, save):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, make(step), keep=2)
    assert steps(tmp_path) == ["step-00000003", "step-00000010"]
    save(tmp_path, 11, make(11), keep=1)
    assert steps(tmp_path) == ["step-00000011"]
    find_latest(tmp_path)[0].verify()
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, 12, make(), keep=0)


def test_the_one_just_saved_stays_even_if_later_steps_exist(tmp_path, make, save):
    save(tmp_path, 30, make(1), keep=2)
    result = save(tmp_path, 10, make(2), keep=1)
    assert steps(tmp_path) == ["step-00000010"] and "step-00000030" in result.messages[0]


def test_saving_a_step_again_replaces_it(tmp_path, make, save):
    save(tmp_path, 5, make(1))
    again = make(2)
    save(tmp_path, 5, again)
    assert steps(tmp_path) == ["step-00000005"]
    loaded = find_latest(tmp_path)[0].load()
    assert all(loaded[name].tobytes() == array.tobytes() for name, array in again.items())


def test_a_failing_progress_leaves_nothing_behind(tmp_path, make, save):
    save(tmp_path, 1, make(1))

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, make(2), progress=stop)
    assert steps(tmp_path) == ["step-00000001"]
