"""Counts by arithmetic: the published sizes, and the tensor shapes that they follow from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pangu_sigma.config import config_from_dict, load_config, parameter_counts, tensor_shapes
from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size
from pangu_sigma.training.flops import flops_per_token
from rre.feed_forward_spec import FeedForwardSpec

ONE_FFN_13B = 2 * 5120 * 20480 + 20480 + 5120


def with_domains(config, count, experts):
    values = config.to_dict()
    values["domains"] = [{"name": f"d{i}", "data": ["x"], "experts": experts} for i in range(count)]
    return config_from_dict(values)


def test_pangu_alpha_13b_has_12_801_billion_parameters(small):
    counts = parameter_counts(small("model.preset=13B"), 40000)
    assert round(counts.total / 1e9, 3) == 12.801
    assert counts.total == counts.shared


def test_forty_domains_of_sixteen_experts_make_the_papers_1085_billion(small):
    config = with_domains(small("model.preset=13B", "model.sparse.layers=8"), 40, 16)
    counts = parameter_counts(config, vocabulary_size(config))
    dense = parameter_counts(small("model.preset=13B"), 40000).total
    assert round(counts.total / 1e9, 3) == 1084.996
    assert counts.total == dense + 8 * (640 - 1) * ONE_FFN_13B
    assert counts.per_domain["d0"] == 8 * 16 * ONE_FFN_13B
    # Top-1 by a table without a gate: a token costs what it costs in the dense model.
    assert set(counts.activated_per_token.values()) == {dense}
    assert counts.routing_entries == 8 * 40 * 40000


def test_one_domain_of_sixteen_experts_is_the_38_billion_sub_model(small):
    config = with_domains(small("model.preset=13B", "model.sparse.layers=8"), 1, 16)
    assert round(parameter_counts(config, 40000).total / 1e9, 2) == 37.97


def test_olmoe_1b_7b_has_6_9_billion_parameters_of_which_a_token_meets_1_3():
    config = load_config(Path(__file__).parents[3] / "configs" / "olmoe_1b_7b.yaml")
    counts = parameter_counts(config, vocabulary_size(config))
    # As transformers counts OlmoeForCausalLM of the published configuration.
    assert counts.total == 6_919_161_856
    assert list(counts.activated_per_token.values()) == [1_282_017_280]


def test_glams_largest_size_meets_its_published_count_with_gated_dense_layers_and_plain_experts():
    """64B/64E: 64 layers 8192 wide, 128 heads of 128, inner width 32768, 256,000 words, every second layer sparse."""
    widths, attention, words = (8192, 32768), 64 * 4 * 8192 * 128 * 128, 256_000 * 8192
    plain, gated = (FeedForwardSpec("gelu", gated=gated, biases=False).num_params(*widths) for gated in (False, True))

    def billions(dense: int, expert: int, experts: int) -> float:
        return round((words + attention + 32 * (dense + experts * expert)) / 1e9, 1)

    assert billions(gated, plain, 2) == 96.6 and round(billions(gated, plain, 64), -2) == 1200
    assert billions(plain, plain, 2) != 96.6 and billions(gated, gated, 2) != 96.6


def test_dense_layers_and_experts_may_be_of_different_kinds(small):
    glam = "model.sparse={pattern: every_other, router: glam, feed_forward: mlp, shared_expert: true}"
    config = small(glam, "model.feed_forward=geglu", "model.activation=gelu", "model.biases=false")
    shapes = tensor_shapes(config, 100)
    assert shapes["blocks.0.feed_forward.gate.weight"] == shapes["blocks.1.shared_expert.up.weight"] == (128, 512)
    assert "domains.code.blocks.1.experts.up.weight" in shapes
    assert not any("gate.weight" in name for name in shapes if "expert" in name)


def test_a_token_of_a_mixture_meets_every_expert(small):
    config = small("model.top_layer=mixture")
    counts = parameter_counts(config, 100)
    assert set(counts.activated_per_token.values()) == {counts.total}
    # The head's product is computed for every expert of a competitive mixture.
    blended = small("model.top_layer=mixture", "model.mixture_loss=cooperative")
    assert (config.predictions, blended.predictions, small().predictions) == (6, 1, 1)
    assert flops_per_token(config, 100) - flops_per_token(blended, 100) == 6 * 5 * 100 * config.model.hidden


@pytest.mark.parametrize(("preset", "billions"), [("350M", 0.35), ("2.6B", 2.6), ("200B", 207)])
def test_the_other_presets_have_about_the_size_of_their_name(small, preset, billions):
    assert parameter_counts(small(f"model.preset={preset}"), 40000).total / 1e9 == pytest.approx(billions, rel=0.03)


def test_the_manifest_names_every_tensor_of_a_small_model(small):
    names = tensor_shapes(small("model.layers=3", "model.sparse={layers: 2, include_query_layer: true}"), 100)
    assert names["embedding.word"] == (100, 128)
    assert names["embedding.position"] == names["embedding.query"] == (256, 128)
    assert names["blocks.0.feed_forward.up.weight"] == (128, 512)
    assert names["blocks.1.attention.projection.weight"] == (128, 128)
    assert names["query_layer.norm2.beta"] == names["norm.gamma"] == (128,)
    assert names["domains.code.blocks.1.experts.up.weight"] == (4, 128, 512)
    assert names["domains.docs.query_layer.experts.down.weight"] == (2, 512, 128)
    assert names["domains.docs.query_layer.experts.down.bias"] == (2, 128)
    assert names["domains.docs.query_layer.routing"] == (100,)
    assert not any("blocks.1.feed_forward" in name or "router" in name for name in names)
    assert len(names) == 3 + 2 + 3 * 12 + 4 + 2 * 2 * 5


def test_counts_are_the_sums_over_the_manifest_without_routing_tables(small):
    config = small("model.sparse.layers=2", "model.domain_parameters.embedding=own")
    shapes, counts = tensor_shapes(config, 100), parameter_counts(config, 100)
    floats = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith(".routing")}
    assert counts.total == sum(floats.values())
    assert counts.shared == sum(size for name, size in floats.items() if not name.startswith("domains."))
    assert counts.per_domain["docs"] == sum(size for name, size in floats.items() if name.startswith("domains.docs."))
    assert "embedding.word" not in shapes and shapes["domains.docs.embedding.word"] == (100, 128)
    assert counts.activated_per_token["code"] == counts.activated_per_token["docs"]


def test_a_switch_layer_has_a_gate_over_all_experts_and_no_tables(small):
    shapes = tensor_shapes(small("model.sparse={layers: 1, router: switch}"), 100)
    assert shapes["blocks.2.router.weight"] == (128, 6)
    assert not any(name.endswith(".routing") for name in shapes)


def test_a_token_meets_k_experts_the_gates_and_the_shared_expert(small):
    config = small("model.sparse={pattern: every_other, router: noisy_top_k, top_k: 3, shared_expert: true}")
    shapes, counts = tensor_shapes(config, 100), parameter_counts(config, 100)
    assert shapes["blocks.1.router.weight"] == shapes["blocks.1.router.noise_weight"] == (128, 6)
    assert shapes["blocks.1.shared_expert.up.weight"] == (128, 512)
    one = 2 * 128 * 512 + 512 + 128
    dense = parameter_counts(small(), 100).total
    assert counts.shared == dense + 2 * 128 * 6  # the shared expert stands where the dense network was
    assert counts.total == counts.shared + 6 * one
    assert set(counts.activated_per_token.values()) == {counts.shared + 3 * one}


def test_a_hash_layer_has_one_table_of_its_own_which_is_no_parameter(small):
    config = small("model.sparse={layers: 1, router: hash}")
    shapes, counts = tensor_shapes(config, 100), parameter_counts(config, 100)
    assert shapes["blocks.2.routing"] == (100,) and counts.routing_entries == 100
    assert [name for name in shapes if name.endswith(".routing")] == ["blocks.2.routing"]
    assert counts.total == sum(math.prod(s) for name, s in shapes.items() if name != "blocks.2.routing")


def test_a_model_without_a_query_layer_has_no_query_table(small):
    shapes = tensor_shapes(small("model.query_layer=none"), 100)
    assert "embedding.query" not in shapes and "blocks.3.norm1.gamma" in shapes
