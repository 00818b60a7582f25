"""One Ascend device trains with its own fused operators, where the configuration and the types allow."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from parallel.dry.compiled_graph import last_graph, operators
from parallel.dry.dry_process import run_dry

CONFIG = Path(__file__).parents[3] / "configs" / "eight_devices_domain.yaml"
SCRIPT = Path(__file__).with_name("one_device_graph.py")
ONE = (
    "parallel={}", "model.layers=3", "model.hidden=128", "model.heads=4", "model.ffn=256", "train.batch_size=4",
    "model.sparse.dispatch=dropless", "experts.store=device",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("objdump")), reason="needs gcc and objdump")


def kinds(folder, *overrides):
    """How often each operator stands in the compiled step, forward and backward."""
    run_dry([str(SCRIPT), str(CONFIG), *ONE, *overrides], folder, 1)
    return Counter(o.kind for o in operators(last_graph(folder / "graphs")))


def test_flash_attention_and_grouped_products_are_in_the_graph(tmp_path):
    graph_kinds = kinds(tmp_path / "grouped")
    assert graph_kinds["FlashAttentionScore"] == graph_kinds["FlashAttentionScoreGrad"] == 3
    # Two products of each of two sparse layers, and of each the gradients of rows and of weights.
    assert graph_kinds["GroupedMatmul"] == 2 * 2 * 3


def test_without_them_the_products_are_the_experts_own(tmp_path):
    graph_kinds = kinds(tmp_path / "ragged", "experts.grouped_matmul=false")
    assert graph_kinds["GroupedMatmul"] == 0 and graph_kinds["FlashAttentionScore"] == 3
