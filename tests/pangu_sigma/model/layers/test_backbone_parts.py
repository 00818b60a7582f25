"""Every part that a configuration can name has a cell, with the tensors that its spec says."""

import numpy as np
import pytest

from pangu_sigma.config.backbone_parts import HEAD_SPECS, NORM_SPECS, POSITION_SPECS
from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.embedding import POSITIONS
from pangu_sigma.model.layers.linear_and_norm import norm
from pangu_sigma.model.layers.tied_embedding_head import HEADS
from parallel.operator_layout import Layout

SIZES = {"layers": 2, "hidden": 8, "heads": 2, "ffn": 8, "positions": 4, "query_layer": "none"}


def tensors_of(cell) -> list[str]:
    return [parameter.name for parameter in cell.get_parameters()]


@pytest.mark.parametrize("name", NORM_SPECS)
def test_a_norm_has_the_tensors_and_first_values_of_its_spec(name):
    config = ModelConfig(**SIZES, norm=name)
    values = {parameter.name: parameter.asnumpy() for parameter in norm(config, Layout()).get_parameters()}
    assert list(values) == list(config.norm_spec.tensors)
    for tensor, value in config.norm_spec.tensors.items():
        np.testing.assert_array_equal(values[tensor], np.full(config.hidden, value, np.float32))


@pytest.mark.parametrize("name", POSITION_SPECS)
def test_a_position_embedding_has_a_table_where_its_spec_says_so(name):
    config = ModelConfig(**SIZES, position=name)
    assert bool(tensors_of(POSITIONS[name](config, Layout()))) == config.position_spec.has_table


@pytest.mark.parametrize("name", HEAD_SPECS)
def test_a_head_has_a_matrix_of_its_own_unless_its_spec_says_tied(name):
    config = ModelConfig(**SIZES, head=name)
    assert bool(tensors_of(HEADS[name](config, 12, Layout()))) != config.head_spec.tied
