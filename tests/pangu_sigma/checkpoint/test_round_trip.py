"""What is saved comes back, byte for byte, in files that the safetensors library reads."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pangu_sigma.checkpoint import BFLOAT16, CheckpointError, open_checkpoint


def assert_same(loaded: dict, saved: dict) -> None:
    assert set(loaded) == set(saved)
    for name, array in saved.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape, name
        assert loaded[name].tobytes() == array.tobytes(), name


def test_everything_comes_back(tmp_path, tensors, save):
    result = save(tmp_path, 1200, tensors, config_text="name: Σ\n")
    checkpoint = open_checkpoint(result.path)
    assert result.path == tmp_path / "checkpoints" / "step-00001200"
    assert_same(checkpoint.load(), tensors)
    assert checkpoint.step == 1200 and checkpoint.domains == ("code", "law")
    assert checkpoint.coverage == {layer: {"code": 4, "law": 2} for layer in ("blocks.2", "query_layer")}
    assert checkpoint.config_text == "name: Σ\n"
    loss_scale = {"value": 65536.0, "clean": 3}
    assert checkpoint.state == {"step": 1200, "cursors": {"code": [3, 2**90]}, "loss_scale": loss_scale}
    assert checkpoint.tokenizer_files() == {"tokenizer.model": b"\x00\x01pieces"}
    assert set(checkpoint.probe()) == {"code", "law"} and checkpoint.probe()["code"][1, 8] == 17
    checkpoint.verify()


def test_every_type_and_shape_comes_back(tmp_path, save):
    draw = np.random.default_rng(1)
    types = ("float32", "float16", "int64", "int32", "uint16", "uint8", "bool")
    shapes = [(3, 5), (), (0, 4)]
    tensors = {f"{name}{shape}": draw.integers(0, 2, shape).astype(name) for name in types for shape in shapes}
    tensors["bits"] = draw.integers(0, 2**16, (3, 7)).astype(np.uint16).view(BFLOAT16)
    tensors["transposed"] = draw.random((6, 4)).astype(np.float32).T
    tensors["strided"] = draw.random((9, 4)).astype(np.float32)[::2, 1:]
    tensors["nan"] = np.array([np.nan, -0.0, np.inf], np.float32)
    checkpoint = open_checkpoint(save(tmp_path, 0, tensors, groups={}).path)
    loaded = checkpoint.load()
    assert_same(loaded, tensors)
    assert checkpoint.manifest.tensors["bits"].dtype == "bfloat16"
    again = open_checkpoint(save(tmp_path, 1, loaded, groups={}).path)
    assert again.manifest.tensors["bits"].dtype == "bfloat16"


@pytest.mark.parametrize("array", [np.zeros(2, ">f4"), np.zeros(2, complex), np.array(["x"]), [1.0]])
def test_a_type_that_no_checkpoint_holds_is_refused_by_name(tmp_path, save, array):
    with pytest.raises(ValueError, match="'embedding.word'"):
        save(tmp_path, 0, {"embedding.word": array}, groups={})


def test_the_safetensors_library_reads_every_file(folder, tensors):
    checkpoint = open_checkpoint(folder)
    read = {}
    for path in checkpoint.files(checkpoint.names()):
        read.update(load_file(folder / path))
    assert_same(read, tensors)
    with safe_open(folder / "probe.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["probe.code", "probe.law"]


def test_a_domains_tensors_lie_in_its_own_files(folder):
    checkpoint = open_checkpoint(folder)
    law = checkpoint.names(domains=["law"], shared=False)
    assert checkpoint.files(law) == ["domains/law.safetensors", "optimizer/domains/law.safetensors"]
    assert all(name.startswith("domains.law.") for name in law)
    model = checkpoint.names(domains=["law"], optimizer=False)
    assert checkpoint.files(model) == ["domains/law.safetensors", "shared.safetensors"]
    assert checkpoint.files(checkpoint.names(parameters=False, domains=[])) == ["optimizer/shared.safetensors"]
    for path in checkpoint.files(checkpoint.names()):
        if path not in checkpoint.files(model):
            (folder / path).unlink()
    assert set(checkpoint.load(model)) == set(model)
    with pytest.raises(CheckpointError, match="no domain 'lwa': choose from code, law"):
        checkpoint.names(domains=["lwa"])
    assert set(checkpoint.probe(["law"])) == {"law"}
    with pytest.raises(CheckpointError, match="no tensor 'embedding.wrod'"):
        checkpoint.load(["embedding.wrod"])


def test_the_same_tensors_give_the_same_bytes(tmp_path, tensors, save):
    one = save(tmp_path / "a", 5, tensors).path
    shuffled = dict(sorted(tensors.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))
    other = save(tmp_path / "b", 5, shuffled).path
    paths = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert paths == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert all((one / path).read_bytes() == (other / path).read_bytes() for path in paths)


def test_files_are_cut_by_size(tmp_path, tensors, save):
    limit = 6000
    checkpoint = open_checkpoint(save(tmp_path, 1, tensors, max_shard_bytes=limit).path)
    files = checkpoint.files(checkpoint.names(domains=["code"], shared=False, optimizer=False))
    assert files == [f"domains/code-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    for path in checkpoint.files(checkpoint.names()):
        data = checkpoint.manifest.files[path].bytes - checkpoint.manifest.files[path].header_bytes
        assert 0 < data <= limit
    assert_same(checkpoint.load(), tensors)
    alone = open_checkpoint(save(tmp_path / "alone", 1, tensors, max_shard_bytes=1).path)
    assert len(alone.files(alone.names())) == len(tensors)
    assert_same(alone.load(), tensors)


def test_saving_and_streaming_hold_no_copy_of_the_model(tmp_path, save):
    tensors = {f"blocks.{i}.feed_forward.up.weight": np.full((1 << 20,), i, np.float32) for i in range(12)}
    one = tensors["blocks.0.feed_forward.up.weight"].nbytes
    tracemalloc.start()
    try:
        path = save(tmp_path, 1, tensors, groups={}).path
        assert tracemalloc.get_traced_memory()[1] < one
        tracemalloc.reset_peak()
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            assert sum(len(piece) for piece in checkpoint.byte_chunks(name)) == one
        assert tracemalloc.get_traced_memory()[1] < 1.5 * one
    finally:
        tracemalloc.stop()


def test_progress_rises_to_the_whole_with_written_and_with_linked_files(tmp_path, tensors, save):
    for step in (1, 2):
        seen = []
        save(tmp_path, step, tensors, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1]
