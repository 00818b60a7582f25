"""What a spec says of a part of the backbone is what its cell and the packages do."""

from __future__ import annotations

import ast
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from extract.export.export_formats import FORMATS
from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.config.parts.attention_options import QK_NORM
from pangu_sigma.config.parts.feed_forward_kinds import FEED_FORWARD_KINDS
from pangu_sigma.config.parts.head_specs import HEAD_SPECS
from pangu_sigma.config.parts.norm_specs import NORM_SPECS
from pangu_sigma.config.parts.position_specs import POSITION_SPECS
from pangu_sigma.model.layers.attention import Attention
from parallel.operator_layout import Layout

ROOT = Path(__file__).parents[4]
SIZES = {"layers": 2, "hidden": 8, "heads": 2, "ffn": 8, "positions": 4, "query_layer": "none"}
NAMES = {*NORM_SPECS, *POSITION_SPECS, *FEED_FORWARD_KINDS, *HEAD_SPECS}
OTHER_MEANING = {"learned"}  # of a stage of lifelong learning


def tensors_of(cell) -> list[str]:
    return [name for name, _ in cell.parameters_and_names()]


def test_no_file_but_the_specs_holds_a_parts_name():
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for package in ("parallel", "rre", "pangu_sigma", "extract")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(("pangu_sigma/config/parts/", "extract/export/hf_files/"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in NAMES - OTHER_MEANING
    ]
    assert named == []


def test_a_dense_model_has_no_parts_of_sparse_layers():
    dense, sparse = (ModelConfig(**SIZES, sparse={"layers": layers, "shared_expert": True}) for layers in (0, 1))
    assert dense.parts.keys() == sparse.parts.keys() - {"model.sparse.shared_expert", "model.sparse.feed_forward"}


@pytest.mark.parametrize("name", NORM_SPECS)
def test_a_norm_has_the_tensors_and_first_values_of_its_spec(name):
    config = ModelConfig(**SIZES, norm=name)
    cell = config.norm_spec.build(config, Layout())
    values = {parameter.name: parameter.asnumpy() for parameter in cell.get_parameters()}
    assert list(values) == list(config.norm_spec.tensors)
    for tensor, value in config.norm_spec.tensors.items():
        np.testing.assert_array_equal(values[tensor], np.full(config.hidden, value, np.float32))


@pytest.mark.parametrize("name", POSITION_SPECS)
def test_a_position_embedding_has_a_table_where_its_spec_says_so(name):
    config = ModelConfig(**SIZES, position=name)
    assert bool(tensors_of(config.position_spec.build(config, Layout()))) == config.position_spec.has_table


@pytest.mark.parametrize("kind", FEED_FORWARD_KINDS.values(), ids=FEED_FORWARD_KINDS)
def test_a_feed_forward_network_has_the_tensors_of_its_form(kind):
    form = kind.form("silu", kind.gateless)
    cell = kind.build(ModelConfig(**SIZES), form, Layout(), ms.float32)
    assert tuple(tensors_of(cell)) == form.tensors


@pytest.mark.parametrize("name", HEAD_SPECS)
def test_a_head_has_a_matrix_of_its_own_unless_its_spec_says_tied(name):
    config = ModelConfig(**SIZES, head=name)
    assert bool(tensors_of(config.head_spec.build(config, 12, Layout()))) != config.head_spec.is_tied


@pytest.mark.parametrize("qk_norm", QK_NORM)
def test_attention_has_the_norms_that_its_options_name(qk_norm):
    config = ModelConfig(**SIZES, attention={"qk_norm": qk_norm})
    modules = {name.split(".")[0] for name in tensors_of(Attention(config, 0, Layout(), ms.float32, None))}
    assert modules == {"query", "key", "value", "projection", *QK_NORM[qk_norm].norms}


def test_the_networks_that_specs_name_are_exported():
    parts = ModelConfig(**SIZES).parts.values()
    specs = (*parts, *NORM_SPECS.values(), *POSITION_SPECS.values(), *FEED_FORWARD_KINDS.values(), *HEAD_SPECS.values())
    assert set().union(*(spec.exports for spec in specs)) == {format_.network for format_ in FORMATS.values()}
