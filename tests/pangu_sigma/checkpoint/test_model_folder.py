"""A model folder is a checkpoint without optimizer state, written as a stream: whole, or not there."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pangu_sigma.checkpoint import (
    CheckpointError,
    Fingerprints,
    StreamedCheckpoint,
    TensorSpec,
    open_checkpoint,
    resolve,
    write_model_folder,
)

MIB = 1 << 20
GROUPS = {"code": 2, "law": 3}


def small_model(read=None, **changes) -> tuple[StreamedCheckpoint, dict[str, np.ndarray]]:
    """One sparse layer with two groups, and its tensors."""
    draw = np.random.default_rng(0)
    arrays = {"embedding.word": draw.random((50, 8), dtype=np.float32)}
    for domain, experts in GROUPS.items():
        arrays[f"domains.{domain}.blocks.1.experts.up.weight"] = draw.random((experts, 8, 16), dtype=np.float32)
        arrays[f"domains.{domain}.blocks.1.routing"] = draw.integers(0, experts, 50, dtype=np.int32)
    arguments = {
        "tensors": [TensorSpec(name, str(array.dtype), array.shape) for name, array in arrays.items()],
        "read": read or (lambda spec: arrays[spec.name]),
        "domains": list(GROUPS),
        "coverage": {"blocks.1": GROUPS},
        "config_text": "schema_version: 2\n",
        "tokenizer_files": {"tokenizer.model": b"pieces"},
        "fingerprints": Fingerprints(tokenizer="t", corpora={}),
        "step": 7,
        "probe": {"law": np.arange(18, dtype=np.int32).reshape(2, 9)},
        "state": {"origin": {"from": "a test"}},
        "documents": {"README.md": "# A model\n"},
    }
    return StreamedCheckpoint(**{**arguments, **changes}), arrays


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_it_opens_as_a_checkpoint_with_every_byte(tmp_path):
    model, arrays = small_model()
    write_model_folder(tmp_path / "deep" / "model", model)
    opened = resolve(tmp_path / "deep" / "model")
    opened.verify()
    loaded = opened.load()
    assert loaded.keys() == arrays.keys()
    assert all(loaded[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert (opened.step, opened.domains, opened.coverage) == (7, ("code", "law"), {"blocks.1": GROUPS})
    assert opened.probe()["law"].tolist() == np.arange(18).reshape(2, 9).tolist()
    assert opened.state == {"origin": {"from": "a test"}} and opened.read_file("README.md") == b"# A model\n"
    plain = load_file(tmp_path / "deep" / "model" / "domains" / "law.safetensors")
    assert set(plain) == {name for name in arrays if name.startswith("domains.law.")}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_pieces_give_the_same_files_as_arrays(tmp_path):
    model, arrays = small_model()
    write_model_folder(tmp_path / "arrays", model)

    def in_pieces(spec: TensorSpec):
        content = arrays[spec.name].tobytes()
        buffer = bytearray(100)
        for start in range(0, len(content), 100):
            size = len(content[start : start + 100])
            buffer[:size] = content[start : start + size]  # the same memory again and again
            yield memoryview(buffer)[:size]

    write_model_folder(tmp_path / "pieces", small_model(in_pieces)[0])
    for name in names(tmp_path / "arrays"):
        assert (tmp_path / "arrays" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes(), name


def test_every_tensor_is_asked_for_once_and_files_keep_to_the_shard_size(tmp_path):
    names_read = []
    _, arrays = small_model()

    def read(spec: TensorSpec) -> np.ndarray:
        names_read.append(spec.name)
        return arrays[spec.name]

    model, _ = small_model(read, max_shard_bytes=1700)
    write_model_folder(tmp_path / "model", model)
    assert sorted(names_read) == sorted(arrays)
    assert "domains/law-00001-of-00002.safetensors" in names(tmp_path / "model")
    written = [name for name in names(tmp_path / "model") if name != "manifest.json"]
    assert model.bytes == sum((tmp_path / "model" / name).stat().st_size for name in written)
    opened = open_checkpoint(tmp_path / "model")
    assert opened.load(["domains.law.blocks.1.routing"])["domains.law.blocks.1.routing"].tolist() == (
        arrays["domains.law.blocks.1.routing"].tolist()
    )


@pytest.mark.parametrize("given", [b"\x00" * 1599, b"\x00" * 1601, np.zeros((8, 50), np.float32)])
def test_a_tensor_of_another_size_is_refused(tmp_path, given):
    model, arrays = small_model()

    def read(spec: TensorSpec):
        if spec.name != "embedding.word":
            return arrays[spec.name]
        return given if isinstance(given, np.ndarray) else [given]

    with pytest.raises(ValueError, match=r"tensor 'embedding.word' came"):
        write_model_folder(tmp_path / "model", small_model(read)[0])
    assert list(tmp_path.iterdir()) == []


def test_optimizer_state_is_refused(tmp_path):
    model, arrays = small_model()
    moment = TensorSpec("optimizer.m.embedding.word", "float32", (2,))
    with pytest.raises(ValueError, match="no optimizer state"):
        write_model_folder(tmp_path / "model", replace(model, tensors=[*model.tensors, moment]))


def test_foreign_domains_missing_groups_and_taken_names_are_refused():
    with pytest.raises(ValueError, match="not among the domains"):
        small_model(tensors=[TensorSpec("domains.art.embedding.word", "float32", (2,))])
    with pytest.raises(ValueError, match="has no tensors in sparse layer"):
        small_model(tensors=[TensorSpec("embedding.word", "float32", (2,))])
    with pytest.raises(ValueError, match="cannot be named"):
        _ = small_model(documents={"manifest.json": ""})[0].new_files


def test_an_output_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    write_model_folder(tmp_path / "model", small_model()[0])  # an empty folder is no obstacle
    before = {name: (tmp_path / "model" / name).read_bytes() for name in names(tmp_path / "model")}
    with pytest.raises(CheckpointError, match="model exists and is not empty"):
        write_model_folder(tmp_path / "model", small_model()[0])
    assert before == {name: (tmp_path / "model" / name).read_bytes() for name in names(tmp_path / "model")}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file"):
        write_model_folder(tmp_path / "file", small_model()[0])
    with pytest.raises(CheckpointError, match="among a run's checkpoints"):
        write_model_folder(tmp_path / "checkpoints" / "step-00000001", small_model()[0])


def test_what_fails_on_the_way_leaves_nothing(tmp_path):
    def broken(model):
        assert model.load(["embedding.word"])["embedding.word"].shape == (50, 8)
        assert not (model.path / "manifest.json").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model_folder(tmp_path / "model", small_model()[0], finish=broken)
    assert list(tmp_path.iterdir()) == []


def test_documents_of_the_finish_are_part_of_the_folder(tmp_path):
    write_model_folder(tmp_path / "model", small_model()[0], finish=lambda model: {"verification.json": "{}\n"})
    opened = open_checkpoint(tmp_path / "model")
    assert opened.read_file("verification.json") == b"{}\n"
    (tmp_path / "model" / "verification.json").write_text("[]\n")
    with pytest.raises(CheckpointError, match=r"verification.json is damaged"):
        opened.verify()


def test_too_little_space_is_told_before_writing(tmp_path):
    size = 1 << 60
    model, _ = small_model(tensors=[TensorSpec("embedding.word", "float32", (size,))], coverage={}, domains=["law"])
    with pytest.raises(CheckpointError, match=r"model was not written: it needs 4\.0 EiB, and .* are free"):
        write_model_folder(tmp_path / "model", model)
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_a_piece_of_a_large_tensor(tmp_path):
    spec = TensorSpec("embedding.word", "float32", (16 * MIB,))

    def read(_: TensorSpec):
        for value in range(64):
            yield np.full(MIB // 4, value, np.float32).tobytes()

    model, _ = small_model(read, tensors=[spec], coverage={}, domains=["law"])
    tracemalloc.start()
    write_model_folder(tmp_path / "model", model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MIB  # of 64


KILLED = """
import sys
from tests.pangu_sigma.checkpoint.test_model_folder import small_model
from pangu_sigma.checkpoint import write_model_folder
def finish(model):
    print("written", flush=True)
    import time; time.sleep(60)
write_model_folder(sys.argv[1], small_model()[0], finish=finish)
"""


def test_what_a_killed_process_left_is_no_model_and_goes_with_the_next_writing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "written\n"
        time.sleep(0.05)
        process.kill()
    (left,) = tmp_path.iterdir()
    assert left.name == f".tmp-model-{process.pid}" and not (left / "manifest.json").exists()
    write_model_folder(tmp_path / "model", small_model()[0])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert json.loads((tmp_path / "model" / "state.json").read_text()) == {"origin": {"from": "a test"}}
