"""Damage on the disk does not spread: what a save links was looked at, and what differs is written anew and named."""

import os
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import CheckpointError, find_latest, open_checkpoint
from pangu_sigma.checkpoint import verified_files as module
from pangu_sigma.checkpoint.verified_files import VerifiedFiles

LAW = "domains/law.safetensors"


def flip(path: Path, offset: int = -1, *, silently: bool = False) -> None:
    """Flip a bit of a file where it lies; silently: as a disk does, which leaves the times."""
    before = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 4]))
    if silently:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def saved(run: Path, save, tensors, verified: VerifiedFiles | None, step: int, **how):
    """One more save of a run that trains the domain code alone."""
    tensors["domains.code.blocks.2.experts.up.weight"] += 1
    return save(run, step, tensors, keep=2, verified=verified, **how)


@pytest.mark.parametrize("path", [LAW, f"optimizer/{LAW}", "shared.safetensors", "tokenizer/tokenizer.model",
                                  "probe.safetensors", "config.yaml"])  # fmt: skip
@pytest.mark.parametrize("in_one_process", [True, False])
def test_a_flipped_byte_is_in_no_later_checkpoint(tmp_path, tensors, save, path, in_one_process):
    verified = VerifiedFiles() if in_one_process else None
    for step in (1, 2, 3):
        saved(tmp_path, save, tensors, verified, step)
    damaged = tmp_path / "checkpoints/step-00000003" / path
    flip(damaged, silently=True)
    result = saved(tmp_path, save, tensors, verified, 4)
    (message,) = result.messages
    assert message.startswith(f"{damaged} was damaged on the disk") and "also in step-00000003" in message
    for step in (3, 4):
        open_checkpoint(tmp_path / f"checkpoints/step-{step:08d}").verify()
    result = saved(tmp_path, save, tensors, verified, 5)
    assert result.messages == () and path not in {"shared.safetensors"} or result.bytes_linked


def test_writers_of_one_checkpoint_write_what_is_damaged_anew(tmp_path, tensors, save, monkeypatch):
    from tests.pangu_sigma.checkpoint.test_distributed import save_with_ranks

    caught: list = []
    with monkeypatch.context() as patch:
        patch.setitem(
            save.__globals__, "save_checkpoint", lambda run, contents, tensors, **how: caught.append((contents, how))
        )
        save(None, 7, {})
    save_with_ranks(2, tmp_path, 7, tensors, caught[0])
    flip(tmp_path / "checkpoints/step-00000007" / LAW)
    second = save_with_ranks(2, tmp_path, 8, tensors, caught[0])[0]
    assert "was damaged on the disk: domains/law.safetensors was written anew" in second.messages[0]
    open_checkpoint(second.path).verify()
    open_checkpoint(tmp_path / "checkpoints/step-00000007").verify()


def test_a_save_does_not_read_all_of_a_large_model_but_each_file_in_eight(tmp_path, save, monkeypatch):
    read: list[str] = []
    digest = module.digest_of_file
    monkeypatch.setattr(module, "digest_of_file", lambda path: read.append(path.name) or digest(path))
    model = {f"blocks.{i}.feed_forward.up.weight": np.full(300_000, i, np.float32) for i in range(8)}
    how = {"groups": {}, "verified": VerifiedFiles(), "max_shard_bytes": 1 << 20, "keep": 2}
    save(tmp_path, 1, model, **how)
    large = []
    for step in range(2, 18):
        read.clear()
        save(tmp_path, step, model, **how)
        large.append([name for name in read if name.startswith("shared")])
    assert all(len(names) == 1 for names in large) and len({name for (name,) in large[:8]}) == 8
    read.clear()
    save(tmp_path, 18, model, **how, read_everything=True)
    assert len([name for name in read if name.startswith("shared")]) == 8


def test_what_the_disk_lost_silently_is_noticed_by_the_last_save(tmp_path, save, monkeypatch):
    """Not even the time of change tells of it."""
    model = {f"blocks.{i}.feed_forward.up.weight": np.full(300_000, i, np.float32) for i in range(8)}
    how = {"groups": {}, "verified": VerifiedFiles(), "max_shard_bytes": 1 << 20, "keep": 2}
    path = save(tmp_path, 1, model, **how).path
    flip(path / "shared-00004-of-00008.safetensors", silently=True)
    known = how["verified"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_identity", lambda path: (0, 0))
        known._sightings = {name: module._Sighting((0, 0), 1) for name in known._sightings}
        assert save(tmp_path, 2, model, **how).messages == ()  # not its turn yet
        result = save(tmp_path, 3, model, **how, read_everything=True)
    assert "shared-00004-of-00008.safetensors was written anew" in result.messages[0]
    open_checkpoint(result.path).verify()


def test_a_resumed_run_reads_every_file_that_it_will_link(tmp_path, tensors, save):
    path = save(tmp_path, 1, tensors).path
    verified = VerifiedFiles()
    verified.read_all(find_latest(tmp_path)[0])
    flip(path / "tokenizer/tokenizer.model")
    with pytest.raises(CheckpointError, match="tokenizer.model is damaged"):
        VerifiedFiles().read_all(find_latest(tmp_path)[0])
