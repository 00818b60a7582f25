"""What `train` builds on a mesh of devices, as far as it goes without one: compiled, cut and filled with values."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.config import load_config
from parallel.dry.compiled_graph import collectives, last_graph, parameter_shards
from parallel.dry.dry_process import run_dry

CONFIGS = Path(__file__).parents[4] / "configs"
SCRIPT = Path(__file__).with_name("ascend_rank.py")
TINY = (
    "model.layers=2", "model.sparse.layers=1", "model.query_layer=none", "model.hidden=64", "model.heads=4",
    "model.ffn=128", "model.positions=16", "data.sequence_length=16", "model.vocab_size=512",
    "data.tokenizer.vocab_size=512",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("objdump")), reason="needs gcc and objdump")


def built(folder: Path, name: str, rank: int, *overrides: str) -> tuple[dict[str, np.ndarray], Path]:
    """What the script found on a rank, and the folder with its graphs."""
    config = load_config(CONFIGS / name, [*TINY, *overrides])
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    run_dry([str(SCRIPT), "config.yaml", "found.npz"], folder, config.parallel.mesh.size, rank)
    return dict(np.load(folder / "found.npz")), folder


STAGES = (
    "model.layers=4", "model.sparse.layers=2", "train.gradient_accumulation_steps=2", "train.batch_size=8",
    "parallel.data=2", "parallel.tensor=1", "model.query_layer=next_position",
)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        (0, ()),
        pytest.param(1, (), marks=pytest.mark.slow),
        (1, ("parallel.optimizer_parallel=true", "parallel.tensor=2")),
    ],
)
def test_a_rank_of_a_stage_has_its_parts_of_its_own_layers(tmp_path, stage, overrides):
    """Two stages of two layers, whose experts are cut over two parts and repeated on two data replicas."""
    name = "eight_devices_pipeline.yaml"
    mesh = load_config(CONFIGS / name, [*TINY, *STAGES, *overrides]).parallel.mesh
    rank = stage * mesh.stage_size + mesh.stage_size - 1
    results, folder = built(tmp_path / "rank", name, rank, *STAGES, *overrides)
    assert results["inputs"].all()
    names = [key.removeprefix("value ") for key in results if key.startswith("value ")]
    experts = {n for n in names if ".experts." in n}
    assert len(experts) == 4 and len(names) > 20
    for name in names:
        np.testing.assert_array_equal(results[f"value {name}"], results[f"loaded {name}"], err_msg=name)
        if name not in experts:
            assert results[f"moment optimizer.m.{name}"].shape == results[f"value {name}"].shape
    graph = last_graph(folder / "graphs" / f"rank_{rank}")
    shards = parameter_shards(graph)
    # What the graph has is what the rank holds, beside sums of gradients and a word table that is received.
    beside = {n for n in shards if not n.startswith("accu_grads.")} - set(names)
    assert beside <= {"embedding.word"} and (stage == 1 or not beside)
    assert all(shards[n] == results[f"value {n}"].shape for n in names)


@pytest.mark.parametrize(
    ("name", "rank", "overrides"),
    [
        ("eight_devices_domain.yaml", 5, ()),
        ("eight_devices_global.yaml", 6, ("parallel.expert=2", "parallel.data=2")),
    ],
)
def test_a_rank_has_its_parts_of_everything(tmp_path, name, rank, overrides):
    results, folder = built(tmp_path / "rank", name, rank, *overrides)
    names = [key.removeprefix("value ") for key in results if key.startswith("value ")]
    assert len(names) > 20 and any(results[f"value {n}"].shape[0] < 512 for n in names if n == "embedding.word")
    for name in names:
        # MindSpore's own loader is the oracle of which part of a tensor a rank has.
        np.testing.assert_array_equal(results[f"value {name}"], results[f"loaded {name}"], err_msg=name)
        for kind in "mv":
            assert results[f"moment optimizer.{kind}.{name}"].shape == results[f"value {name}"].shape
    # With everything below frozen, nobody asks for the gradient of the rows that travelled to experts.
    for graphs, travels in (("graphs", 4), ("frozen", 3), ("evaluation", 2)):
        graph = last_graph(folder / graphs / f"rank_{rank}")
        # Later graphs find the parts that the first one made, and exchange rows between the same ranks.
        parts = {n: shape for n, shape in parameter_shards(graph).items() if n in names}
        assert parts and all(shape == results[f"value {n}"].shape for n, shape in parts.items())
        exchanges = [c for c in collectives(graph) if c.kind == "AlltoAll"]
        assert len(exchanges) == travels and len({c.ranks for c in exchanges}) == 1
        assert all(len(c.ranks) == 2 for c in exchanges)
