"""Comparison of two commits: a tensor or a loss that differs in one bit is seen; a new name alone is no difference."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.commit_checkout import Checkout, common_overrides
from benchmarks.commit_results import compare_folders, compare_json, compare_metrics, results_table
from benchmarks.commit_speed import Speed, speeds_table


def write_checkpoint(folder: Path, weight: np.ndarray, key: str = "clip_norm", piece: bytes = b"\xff\x00") -> Path:
    folder.mkdir()
    save_file({"weight": weight, "bias": np.zeros(2, np.float32)}, folder / "shared.safetensors")
    (folder / "config.yaml").write_text(f"optimizer:\n  {key}: 1.0\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(piece)
    return folder


def write_metrics(path: Path, losses: list[float], name: str = "loss") -> Path:
    records = [
        {"kind": "train", "step": step, name: loss, "losses": {"code": loss}, "seconds": id(path), "note": None}
        for step, loss in enumerate(losses, 1)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def differences(comparisons) -> dict[str, tuple[str, ...]]:
    return {row.name: row.differences for row in comparisons if row.differences}


WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_equal_folders_are_equal(tmp_path):
    rows = compare_folders("run", write_checkpoint(tmp_path / "a", WEIGHT), write_checkpoint(tmp_path / "b", WEIGHT))
    assert differences(rows) == {} and not any(row.notes for row in rows)
    assert "DIFFERENT" not in results_table(rows)


@pytest.mark.parametrize(
    "changed",
    [np.nextafter(WEIGHT, np.float32(9)), WEIGHT.reshape(3, 2), WEIGHT.astype(np.float16), WEIGHT.view(np.int32)],
    ids=["last bit", "shape", "width", "type"],
)
def test_a_tensor_that_differs_is_named(tmp_path, changed):
    rows = compare_folders("run", write_checkpoint(tmp_path / "a", WEIGHT), write_checkpoint(tmp_path / "b", changed))
    ((name, (difference,)),) = differences(rows).items()
    assert name == "run: shared.safetensors" and difference.startswith("weight: ")
    assert difference in results_table(rows)


def test_a_zero_of_the_other_sign_differs(tmp_path):
    paths = [
        write_checkpoint(tmp_path / name, np.array([zero], np.float32)) for name, zero in (("a", 0.0), ("b", -0.0))
    ]
    assert differences(compare_folders("run", *paths))


def test_a_key_of_another_name_is_noted_and_a_tokenizer_that_differs_is_not_passed(tmp_path):
    old = write_checkpoint(tmp_path / "a", WEIGHT)
    renamed = write_checkpoint(tmp_path / "b", WEIGHT, key="max_grad_norm")
    rows = compare_folders("run", old, renamed)
    assert differences(rows) == {}
    assert [row.notes for row in rows if row.notes] == [("config.yaml: 2 lines differ, e.g. -  clip_norm: 1.0",)]
    rows = compare_folders("run", old, write_checkpoint(tmp_path / "c", WEIGHT, piece=b"\xff\x01"))
    assert differences(rows) == {"run: tokenizer.model": ("bytes differ",)}


def write_onnx(folder: Path, weight: np.ndarray, operator: str) -> Path:
    helper = pytest.importorskip("onnx", reason="onnx is not installed").helper
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    logits = helper.make_tensor_value_info("logits", 1, ["length", 2])
    ids = helper.make_tensor_value_info("input_ids", 7, ["batch", "length"])
    nodes = [
        helper.make_node("Gather", ["weight", "input_ids"], ["rows"]),
        helper.make_node(operator, ["rows", "axis"] if operator == "Squeeze" else ["rows", "shape"], ["logits"]),
    ]
    constants = {"weight": weight, "axis": np.array([0]), "shape": np.array([-1, 2])}
    tensors = [
        helper.make_tensor(name, 1 if name == "weight" else 7, a.shape, a.ravel()) for name, a in constants.items()
    ]
    graph = helper.make_graph(nodes, "graph", [ids], [logits], tensors)
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def test_a_graph_of_other_operators_is_compared_by_what_it_computes(tmp_path):
    weight = np.arange(32, dtype=np.float32).reshape(16, 2)
    old = write_onnx(tmp_path / "a", weight, "Squeeze")
    assert differences(compare_folders("onnx", old, write_onnx(tmp_path / "b", weight, "Reshape"))) == {}
    weight[3, 1] = np.nextafter(weight[3, 1], np.float32(99))
    ((name, (difference,)),) = differences(
        compare_folders("onnx", old, write_onnx(tmp_path / "c", weight, "Reshape"))
    ).items()
    assert name == "onnx: model.onnx" and difference.startswith("output logits: ")


def test_a_file_that_one_commit_did_not_write_is_a_difference(tmp_path):
    old, new = (write_checkpoint(tmp_path / name, WEIGHT) for name in "ab")
    (new / "tokenizer.model").unlink()
    assert differences(compare_folders("run", old, new)) == {"run: text files": ("tokenizer.model: only in OLD",)}
    assert differences(compare_folders("run", tmp_path / "none", tmp_path / "neither"))


def test_a_loss_that_differs_in_its_last_bit_is_named_with_its_step_and_times_are_not_compared(tmp_path):
    losses = [8.37, float("nan"), 7.5]
    old, same = (write_metrics(tmp_path / name, losses) for name in "ab")
    assert not compare_metrics(old, same).differences
    new = write_metrics(tmp_path / "c", [8.37, float("nan"), float(np.nextafter(7.5, 8))])
    assert compare_metrics(old, new).differences == (
        "train loss: 7.5 became 7.500000000000001 at step 3",
        "train losses.code: 7.5 became 7.500000000000001 at step 3",
    )
    assert compare_metrics(old, write_metrics(tmp_path / "d", losses[:2])).differences


def test_a_metric_of_another_name_is_noted_if_its_numbers_are_the_same(tmp_path):
    old = write_metrics(tmp_path / "a", [8.0, 7.0])
    comparison = compare_metrics(old, write_metrics(tmp_path / "b", [8.0, 7.0], name="mean_loss"))
    assert comparison.differences == () and comparison.notes == ("train loss is called train mean_loss",)
    changed = write_metrics(tmp_path / "c", [8.0, 7.5], name="mean_loss")
    assert "train loss: only in OLD" in compare_metrics(old, changed).differences


def test_no_metrics_at_all_are_no_proof(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("", encoding="utf-8")
    assert compare_metrics(tmp_path / "a", tmp_path / "b").differences == ("no values",)


def test_generated_texts_are_compared_value_by_value(tmp_path):
    for name, ids in (("a", [1, 2]), ("b", [1, 3])):
        (tmp_path / name).write_text(json.dumps({"text": "x", "ids": ids}), encoding="utf-8")
    assert compare_json("text", tmp_path / "a", tmp_path / "a").differences == ()
    assert compare_json("text", tmp_path / "a", tmp_path / "b").differences == ("ids.1: 2 became 3",)


def test_speed_is_the_median_of_the_ratios_inside_a_round():
    steady = Speed("training", (100.0, 50.0, 200.0), (99.0, 50.0, 10.0))
    assert steady.ratio == 0.99 and steady.passed
    slower = Speed("decoding", (100.0, 50.0, 200.0), (96.0, 48.0, 250.0))
    assert not slower.passed
    assert (
        speeds_table([steady, slower]).splitlines()[-1] == "| decoding | 100 | 96 | 0.960 | 0.960 to 1.250 | SLOWER |"
    )


def test_only_keys_that_both_commits_know_are_overridden_and_the_others_are_told(tmp_path, capsys):
    checkouts = []
    for name, key in (("old", "clip_norm"), ("new", "max_grad_norm")):
        (tmp_path / name / "configs").mkdir(parents=True)
        text = f"train: {{steps: 220}}\noptimizer: {{{key}: 1.0}}\n"
        (tmp_path / name / "configs/quickstart.yaml").write_text(text, encoding="utf-8")
        checkouts.append(Checkout(tmp_path / name, name, ()))
    assert common_overrides({"train.steps": "20", "optimizer.clip_norm": "2"}, checkouts) == ["train.steps=20"]
    assert "optimizer.clip_norm" in capsys.readouterr().err
