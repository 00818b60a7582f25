"""Cutting without a look at the function: the right bytes, nothing foreign, and every refusal."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from extract.extraction_job import extract, plan
from extract.quickstart_extraction import make_room
from pangu_sigma.checkpoint import open_checkpoint, write_model_folder
from pangu_sigma.checkpoint.file_size import parse_size
from pangu_sigma.checkpoint.float_types import as_float32, convert_float
from pangu_sigma.config import tensor_shapes
from pangu_sigma.errors import UserError
from pangu_sigma.trained_model import stored_config
from tests.extract.conftest import VOCAB, save_model


def cut(parent: Path, out: Path, *domains: str, **options):
    return extract(plan(parent, domains, out, **options), out, check=False).model


def everything(model) -> dict[str, np.ndarray]:
    return model.load()


def test_the_sub_model_is_the_parents_files_and_nothing_of_others(parent, tmp_path):
    model = cut(parent, tmp_path / "law", "law")
    assert model.domains == ("law",) and model.coverage == {"blocks.1": {"law": 1}}
    for file in ("shared.safetensors", "domains/law.safetensors"):
        assert (tmp_path / "law" / file).read_bytes() == (parent / file).read_bytes()
    names = set()
    for file in (tmp_path / "law").rglob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            names |= set(tensors.keys())
    assert names == set(tensor_shapes(stored_config(model), VOCAB)) | {"probe.law"}
    for path in (tmp_path / "law").rglob("*"):
        # Whoever gets a sub-model does not even learn the other domains' names.
        assert path.is_dir() or b"poems" not in path.read_bytes(), path
    open_checkpoint(tmp_path / "law").verify()


def test_several_domains_stay_in_the_parents_order(parent, tmp_path):
    model = cut(parent, tmp_path / "two", "poems", "code", "poems")
    assert model.domains == ("code", "poems") and list(model.probe()) == ["code", "poems"]
    assert stored_config(model).domain_names == ("code", "poems")


def test_the_configuration_is_one_to_continue_with(parent, tmp_path):
    config = stored_config(cut(parent, tmp_path / "law", "law"))
    assert config.train.phases == () and config.data.max_domains_per_batch == 1
    assert config.run.dir == str(tmp_path / "law") and config.domains[0].data == ("/nowhere/law.jsonl",)
    assert config.model == stored_config(open_checkpoint(parent)).model


def test_a_domain_that_was_never_drawn_can_continue_alone(saved, tmp_path):
    parent = saved()
    path = parent / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["domains"][1]["weight"] = 0.0
    values["train"]["phases"] = []
    stored = open_checkpoint(parent)
    stored.__dict__["config_text"] = yaml.safe_dump(values)
    from extract.extraction_plan import ExtractionPlan

    assert ExtractionPlan(stored, ("law",)).config.domains[0].weight == 1.0


def test_neither_foreign_files_nor_optimizer_state_are_read(saved, tmp_path):
    parent = saved()
    for file in ("domains/code.safetensors", "optimizer/domains/law.safetensors", "state.json"):
        content = bytearray((parent / file).read_bytes())
        content[-1] ^= 1
        (parent / file).write_bytes(content)
    cut(parent, tmp_path / "law", "law").verify()


@pytest.mark.parametrize("file", ["shared.safetensors", "domains/law.safetensors", "tokenizer/tokenizer.model"])
@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}])
def test_an_altered_file_is_named_and_nothing_is_left(saved, tmp_path, file, options):
    parent = saved()
    content = bytearray((parent / file).read_bytes())
    content[len(content) // 2] ^= 1
    (parent / file).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{parent / file} is damaged")):
        cut(parent, tmp_path / "out" / "law", "law", **options)
    assert not list(tmp_path.glob("out/*")) + list(tmp_path.glob("out/.*"))


def test_an_incomplete_checkpoint_is_refused(saved, tmp_path):
    parent = saved()
    (parent / "domains" / "poems.safetensors").unlink()
    with pytest.raises(UserError, match=r"poems.safetensors of the checkpoint is missing"):
        plan(parent, ["law"])
    shutil.rmtree(parent)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        plan(parent.parent.parent, ["law"])


def test_an_unknown_domain_is_answered_with_the_nearest(parent):
    with pytest.raises(UserError, match=r"has no domain 'laws'; did you mean 'law'\?"):
        plan(parent, ["laws"])


def test_outputs_that_would_mix_with_something_else_are_refused(parent, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="full exists and is not empty"):
        plan(parent, ["law"], tmp_path / "full")
    with pytest.raises(UserError, match="lies inside"):
        plan(parent, ["law"], parent / "law")
    with pytest.raises(UserError, match="among a run's checkpoints"):
        plan(parent, ["law"], parent.parent / "law")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_table_over_all_domains_is_refused_with_the_reason(saved):
    parent = saved(sparse={"layers": 1, "router": "hash"})
    with pytest.raises(UserError, match=r"one table over the experts of all domains \(blocks.1.routing\)"):
        plan(parent, ["law"])


def test_a_learned_gate_over_all_domains_is_refused_with_the_reason(saved):
    parent = saved(sparse={"layers": 1, "router": "switch"})
    with pytest.raises(UserError, match=r"learned gate over the experts of all domains \(blocks.1.router.weight\)"):
        plan(parent, ["law"])


def test_too_little_disk_is_told_before_writing(parent, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(UserError, match=r"law was not written: it needs .* are free in"):
            plan(parent, ["law"], disk / "law")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_type_rounds_every_weight_and_leaves_tables_and_probes(parent, tmp_path, dtype):
    model = cut(parent, tmp_path / "poems", "poems", dtype=dtype)
    stored = open_checkpoint(parent)
    for name, array in everything(model).items():
        before = stored.load([name])[name]
        if name.endswith(".routing"):
            assert array.tobytes() == before.tobytes()
        else:
            assert model.manifest.tensors[name].dtype == dtype
            assert array.tobytes() == convert_float(name, before, dtype).tobytes()
    size = sum(path.stat().st_size for path in (tmp_path / "poems").rglob("*.safetensors"))
    full = sum((parent / file).stat().st_size for file in ("shared.safetensors", "domains/poems.safetensors"))
    assert size < 0.65 * full
    # and back again: a half model is a parent like any other
    back = cut(tmp_path / "poems", tmp_path / "back", "poems", dtype="float32")
    for name, array in everything(back).items():
        assert array.tobytes() == as_float32(name, everything(model)[name]).tobytes()


def test_files_keep_to_a_shard_size_and_lose_nothing(parent, tmp_path):
    model = cut(parent, tmp_path / "poems", "poems", max_shard_bytes=8000)
    files = [path for path in (tmp_path / "poems").rglob("*.safetensors") if "probe" not in path.name]
    assert len(files) > 5
    parent_folder, shards = open_checkpoint(parent), everything(model)
    assert all(parent_folder.load([name])[name].tobytes() == array.tobytes() for name, array in shards.items())
    assert shards.keys() == set(tensor_shapes(stored_config(model), VOCAB))
    one = cut(tmp_path / "poems", tmp_path / "again", "poems", max_shard_bytes=1 << 30)
    assert (tmp_path / "again" / "shared.safetensors").read_bytes() == (parent / "shared.safetensors").read_bytes()
    assert one.files(one.names()) == ["domains/poems.safetensors", "shared.safetensors"]


def test_a_sharded_parent_is_copied_file_by_file(saved, tmp_path):
    parent = saved(shard=8000)
    planned = plan(parent, ["poems"]).folder("out")
    copied = [file.path for file in planned.files if file.copy]
    assert len(copied) > 5 and not planned.tensors
    write_model_folder(tmp_path / "poems", planned)
    for path in copied:
        assert (tmp_path / "poems" / path).read_bytes() == (parent / path).read_bytes()
    # the same size given is no reason to write anything anew
    assert not plan(parent, ["poems"], max_shard_bytes=8000).folder("out").tensors


def test_folding_gives_the_tensors_of_an_ordinary_pangu_alpha(saved, tmp_path):
    sparse = {"layers": 2, "include_query_layer": True}
    parent = saved({"code": 2, "law": 1}, domain_parameters={"embedding": "own"}, sparse=sparse)
    model = cut(parent, tmp_path / "law", "law", fold=True)
    config = stored_config(model)
    assert (
        config.model.sparse.layers == 0
        and config.model.domain_parameters.embedding == "shared"
        and model.coverage == {}
    )
    tensors = everything(model)
    assert {name: array.shape for name, array in tensors.items()} == tensor_shapes(config, VOCAB)
    assert not any(name.startswith("domains.") for name in tensors)
    before = open_checkpoint(parent).load()
    up = before["domains.law.query_layer.experts.up.weight"]
    np.testing.assert_array_equal(tensors["query_layer.feed_forward.up.weight"], up[0])
    np.testing.assert_array_equal(tensors["embedding.word"], before["domains.law.embedding.word"])


@pytest.mark.parametrize(
    "domains, reason",
    [(["code"], r"one expert in every sparse layer \(blocks.1 has 2\)"), (["code", "law"], "2 domains cannot fold")],
)
def test_what_cannot_fold_is_refused_with_the_reason(parent, domains, reason):
    with pytest.raises(UserError, match=reason):
        plan(parent, domains, fold=True)


def test_experts_of_another_kind_than_dense_layers_do_not_fold_but_can_be_cut_out(tmp_path):
    dense = {"feed_forward": "geglu", "activation": "gelu", "biases": False}
    sparse = {"layers": 1, "feed_forward": "mlp"}
    parent = save_model(tmp_path / "run", {"law": 1, "code": 2}, **dense, sparse=sparse)
    with pytest.raises(UserError, match="experts of kind mlp beside dense layers of kind geglu"):
        plan(parent, ["law"], fold=True)
    model = cut(parent, tmp_path / "law", "law")
    assert model.load().keys() == set(tensor_shapes(stored_config(model), VOCAB))


def test_a_dense_model_has_nothing_to_fold(tmp_path):
    parent = save_model(tmp_path / "run", {"law": 1}, sparse={})
    with pytest.raises(UserError, match="no sparse layers to fold"):
        plan(parent, ["law"], fold=True)
    model = cut(parent, tmp_path / "law", "law")
    assert model.load().keys() == set(tensor_shapes(stored_config(model), VOCAB))


def test_a_sub_model_can_be_cut_again(parent, tmp_path):
    cut(parent, tmp_path / "two", "poems", "law")
    cut(tmp_path / "two", tmp_path / "one", "poems")
    cut(parent, tmp_path / "straight", "poems")
    for file in ("shared.safetensors", "domains/poems.safetensors", "probe.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()


def test_the_quickstart_replaces_only_what_was_cut_out(parent, tmp_path):
    cut(parent, tmp_path / "law", "law")
    make_room(tmp_path / "law")
    assert not (tmp_path / "law").exists()
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="law exists and is not empty"):
        make_room(tmp_path / "law")


def test_the_card_says_where_the_model_came_from(parent, tmp_path):
    cut(parent, tmp_path / "law", "law")
    card = (tmp_path / "law" / "README.md").read_text()
    stored = open_checkpoint(parent)
    for part in (stored.sha256, "step 8, 3 domains", "Not verified", "run.init_from=DIR", "| 1 (law) |"):
        assert part in card
    assert f'"{stored.sha256}"' in (parent / "manifest.json").read_text()


@pytest.mark.parametrize(
    "text, size", [("500MB", 500_000_000), ("4GiB", 4 << 30), ("1000", 1000), ("1.5 kb", 1500), ("2g", 2 * 10**9)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5", "4 apples", "iB", "0.1"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)
