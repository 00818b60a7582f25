"""Any export: what is refused, that nothing is left behind, that every source of a model and tokenizer will do."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from extract.export import export_job
from extract.export.export_formats import FORMATS, Options
from extract.export.export_job import export
from extract.extraction_job import extract, plan
from pangu_sigma.data.tokenizers.pangu_alpha_tokenizer import PanguAlphaTokenizer
from pangu_sigma.errors import UserError
from rre.routers import ExpertGroups
from tests.extract.export.conftest import make_config, save_model
from tests.pangu_sigma.model.model_driver import make_tensors
from tests.pangu_sigma.training.training_process import ROOT, assert_refused, command

PANGU_MODEL = ROOT.parent / "shared" / "data" / "pangu_alpha" / "vocab.model"
POEMS = ROOT.parent / "shared" / "data" / "corpora" / "poetry_zh.jsonl"


@pytest.mark.parametrize("format_", FORMATS)
def test_a_folder_with_something_in_it_stays_as_it_is(stored, tmp_path, format_):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(stored("dense").path, tmp_path / "out", format_)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is a file"):
        export(stored("dense").path, tmp_path / "out" / "mine.txt", format_)


def test_an_empty_folder_is_taken(stored, tmp_path):
    (tmp_path / "out").mkdir()
    export(stored("dense").path, tmp_path / "out", "hf")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--format", "gguf"], "'gguf' is no format to export to; choose hf, hf-olmoe, mindir, onnx"),
        (["--format", "hf", "--domain", "poem"], "did you mean 'poems'?"),
        (["--format", "hf", "--dtype", "int8"], "'int8' is no element type; choose float32, float16, bfloat16"),
        (["--format", "hf", "--signature", "sigma"], "signature means nothing to the format hf; leave it out"),
        (["--format", "hf", "--max-shard-size", "big"], "is no size"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(stored, tmp_path, arguments, reason):
    done = command("export", stored("full_model").path, "--out", tmp_path / "out", *arguments, cwd=tmp_path)
    assert_refused(done, reason)
    assert not list(tmp_path.iterdir())


def test_a_gate_over_all_domains_cannot_be_exported_in_part(stored, tmp_path):
    with pytest.raises(UserError, match=r"router = switch\) chooses among the experts of all domains"):
        export(stored("switch").path, tmp_path / "out", "hf", ["code"])


@pytest.mark.parametrize("form", ["hf", "onnx", "mindir", "mindformers"])
@pytest.mark.parametrize(("case", "reason"), [("olmoe", "sparse.router = olmoe"), ("shared_expert", "parts")])
def test_what_no_format_can_express_is_refused(stored, tmp_path, case, reason, form):
    with pytest.raises(UserError, match=f"{reason}.*does not have yet"):
        export(stored(case).path, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["onnx", "torch", "transformers"])
def test_a_missing_package_is_named_with_its_extra(stored, tmp_path, monkeypatch, missing):
    monkeypatch.setattr(export_job, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(UserError, match=rf"needs the package {missing}: pip install 'pangu-sigma\[onnx\]'"):
        export(stored("dense").path, tmp_path / "out", "onnx")


def test_too_little_disk_is_said_before_writing(stored, tmp_path, monkeypatch):
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(free=1000))
    with pytest.raises(UserError, match="it needs .* and 1000 B are free"):
        export(stored("dense").path, tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


def test_an_altered_checkpoint_is_refused_by_the_files_name(stored, tmp_path):
    import shutil

    copy = tmp_path / "step"
    shutil.copytree(stored("full_model").path, copy)
    file = copy / "domains" / "poems.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for format_ in set(FORMATS) - {"hf-olmoe"}:  # which refuses the model's parts before it reads a weight
        with pytest.raises(UserError, match="poems.safetensors is damaged"):
            export(copy, tmp_path / "out", format_)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    export(copy, tmp_path / "out", "hf", ["code"])  # reads nothing of the other domain


def test_an_interruption_leaves_nothing(stored, tmp_path):
    code = (
        "import sys, os, signal\n"
        # Whoever starts the tests in the background has it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from extract.export import export_job, hf_format\n"
        "write_shards = hf_format.write_shards\n"
        "def interrupted(*arguments):\n"
        "    write_shards(*arguments)\n"
        "    assert list(os.scandir(sys.argv[2]))\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "hf_format.write_shards = interrupted\n"
        "export_job.export(sys.argv[1], sys.argv[2] + '/out', 'hf')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, stored("dense").path, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_goes_with_the_next(stored, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".tmp-out-{gone.pid}"
    left.mkdir()
    (left / "config.json").write_text("{}")
    export(stored("dense").path, tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_exports_a_run(stored, tmp_path):
    """A run's folder is its last checkpoint; the path is what is printed."""
    run = stored("sub_model").path.parents[1]
    done = command("export", run, "--format", "hf", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'out'}\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["domains"] == ["code"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cut_out_model_stored_in_few_bits_is_exported_as_stored(stored, tmp_path, dtype):
    source = stored("no_query_layer")
    extract(plan(source.path, ["poems"], tmp_path / "model", dtype=dtype), tmp_path / "model", check=False)
    export(tmp_path / "model", tmp_path / "low", "hf", options=Options(dtype=dtype))
    export(tmp_path / "model", tmp_path / "full", "hf")
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "low", trust_remote_code=True, dtype="auto")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", trust_remote_code=True)
    for name, tensor in full.state_dict().items():
        stored_as = low.state_dict()[name]
        assert torch.equal(stored_as.to(tensor.dtype), tensor), name
        assert stored_as.dtype == (getattr(torch, dtype) if tensor.is_floating_point() else torch.int32)


def test_a_model_folded_to_a_dense_one_is_exported(tokenizer, tmp_path):
    groups = ExpertGroups(("code", "poems"), (1, 2))
    config = make_config(tokenizer, groups, {"sparse": {"layers": 1}})
    tensors = make_tensors(config.model, tokenizer.vocab_size, groups)
    path = save_model(tmp_path / "run", config, tensors, tokenizer, groups)
    extract(plan(path, ["code"], tmp_path / "model", fold=True), tmp_path / "model", check=False)
    export(tmp_path / "model", tmp_path / "folded", "hf")
    export(path, tmp_path / "sparse", "hf", ["code"])
    tokens = torch.arange(40).reshape(2, 20) + 100
    with torch.no_grad():
        folded, sparse = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True).eval()(tokens).logits
            for name in ("folded", "sparse")
        )
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["sparse_layers"] == []
    np.testing.assert_allclose(folded.numpy(), sparse.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not PANGU_MODEL.exists(), reason="PanGu-α's vocab.model is not there")
def test_pangu_alphas_tokenizer_makes_the_same_ids_and_text(tmp_path):
    tokenizer = PanguAlphaTokenizer(PANGU_MODEL.read_bytes())
    groups = ExpertGroups(("code",), (1,))
    config = make_config(tokenizer, groups, {"layers": 2})
    save = save_model(
        tmp_path / "run", config, make_tensors(config.model, tokenizer.vocab_size, groups), tokenizer, groups
    )
    export(save, tmp_path / "out", "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    texts = ["你好，今天天气不错。", "def f(x):\n    return x\n", "<eot> 和 <pad> 都是字", "", " a  b\n\n"]
    if POEMS.exists():
        with POEMS.open(encoding="utf-8") as file:
            texts += [json.loads(next(file))["text"] for _ in range(50)]
    assert theirs.encode(texts[0], add_special_tokens=False) == [5772, 10, 465, 235, 464, 1123, 12]
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode([9, *ids], skip_special_tokens=True) == tokenizer.decode(ids)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (9, 6)
    assert theirs(["你好", "今天天气不错"], padding=True).input_ids[0][0] == 6


@pytest.mark.skipif(not POEMS.exists(), reason="the corpora are not there")
def test_real_text_comes_back_from_the_exported_tokenizer(stored, tmp_path):
    source = stored("dense")
    export(source.path, tmp_path / "out", "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    texts = [Path(__file__).read_text(encoding="utf-8")]
    for path in sorted(POEMS.parent.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            texts += [json.loads(next(file))["text"] for _ in range(40)]
    for text in texts:
        ids = source.tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_by_its_file_and_described(name):
    module = import_module(f"extract.export.{FORMATS[name].module}")
    assert all(callable(getattr(module, part)) for part in ("weight_bytes", "write"))
    assert set(FORMATS[name].options) <= {field.name for field in dataclasses.fields(Options)}
    assert f"`{name}`" in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
