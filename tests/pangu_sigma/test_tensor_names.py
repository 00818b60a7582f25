"""Tensor names: what is built parses back to its parts, and no other module builds or splits one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pangu_sigma.model.state_dict import model_tensors
from pangu_sigma.tensor_names import (
    DOMAIN_EMBEDDING,
    QUERY_LAYER,
    block_index,
    block_name,
    chunk_name,
    dense_name,
    expert_name,
    is_expert,
    is_gate,
    is_routing,
    of_domain,
    parse_name,
    probe_name,
    steps_name,
    table_name,
    tensor_name,
)
from pangu_sigma.training.optimizer import Optimizer
from rre.router_specs import LAYER
from tests.pangu_sigma.training.small_trainer import small_config, small_model

OLMOE = {
    "query_layer": "none",
    "norm": "rmsnorm",
    "position": "rope",
    "feed_forward": "swiglu",
    "activation": "silu",
    "biases": False,
    "head": "untied",
    "attention": {"qk_norm": True},
    "sparse": {"layers": 0, "pattern": "every", "router": "olmoe", "top_k": 2},
}
MODELS = {
    "PanGu-Sigma": {"layers": 3, "sparse": {"layers": 2, "include_query_layer": True}},
    "OLMoE": OLMOE,
    "hash": {"sparse": {"router": "hash"}},
    "noisy gate with a shared expert": {"sparse": {"router": "noisy_top_k", "top_k": 2, "shared_expert": True}},
    "own word tables": {"domain_parameters": {"embedding": "own"}},
    "mixture": {"top_layer": "mixture", "sparse": {"layers": 0}},
}

# What stands in the text of a tensor's name and in no configuration key, sentence or file name; {} is a value.
NAME = re.compile(
    r"\bblocks\.(\d|\{|$)|\bquery_layer\.|^domains\.(\{\}\.(?!experts$)|$)"
    r"|\bexperts\.(gate|up|down|\{)|\.(experts\.|routing\b)|^(\.experts|experts\.)$"
    r"|\b(embedding|head)\.(word|position|query)\b|\battention\.(query|key|value|projection|\{)"
    r"|\b(feed_forward|shared_expert)\.(gate|up|down|\{)|\brouter\.(weight|noise)|\.router\.|\bnorm[12]?\.(gamma|beta|\{)"
    r"|(^|\})\.(weight|bias|gamma|beta|noise_weight)\b|^optimizer\.([mv]\b|steps|\{|$)|^(probe|cache)\.(\{|$)"
)
# Files that may: the module itself, and those whose names are another program's.
FOREIGN = {
    "extract/export/hf_files": "exported files stand alone",
    "extract/export/hf_format.py": "names in the exported PyTorch file",
    "pangu_sigma/convert/olmoe_names.py": "names in Hugging Face's OLMoE",
    "pangu_sigma/convert/pangu_alpha_names.py": "names in PanGu-α",
    "pangu_sigma/lifelong/lifelong_job.py": "keys of a domain in the configuration",
    "pangu_sigma/tensor_names.py": "ours",
    "rre/adamw.py": "weight decay goes by what a tensor is at the end of any name",
}
# What else is split at dots: keys of the configuration, and names of files.
KEYS = {"key", "key.path", "path", "path.name"}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_every_name_of_a_checkpoint_parses_and_is_built_again(model):
    model = small_model(small_config(model))
    for name in model_tensors(model, Optimizer(model).moments()):
        parsed = parse_name(name)
        assert str(parsed) == name
        assert parsed.layer is None or parsed.layer in model.config.model.layer_names
        assert parsed.domain is None or parsed.domain in model.groups.names
        assert parsed.is_optimizer == ("optimizer" in name.split("."))
        if parsed.state == "steps":
            assert name == steps_name(parsed.layer or DOMAIN_EMBEDDING, parsed.domain)
        elif is_routing(name):
            assert name == table_name(parsed.layer, parsed.owner)
        elif parsed.domain is None:
            path = [parsed.module, parsed.tensor] if parsed.layer is None else [parsed.layer, parsed.part]
            assert name == tensor_name(*path, state=parsed.state)
        else:
            assert is_expert(name) == (parsed.layer is not None)
            assert name == expert_name(parsed.layer or DOMAIN_EMBEDDING, parsed.tensor, parsed.domain, parsed.state)


@pytest.mark.parametrize("domain", ["experts", "optimizer", "router", "routing", "blocks", "query_layer", "embedding"])
def test_a_domain_may_be_called_as_a_part_of_a_name(domain):
    table, words = table_name("blocks.1", domain), tensor_name("embedding", "word", domain=domain)
    assert parse_name(table) == (domain, "weight", "blocks.1", "routing", "")
    assert parse_name(words) == (domain, "weight", None, "embedding", "word")
    assert not is_expert(table) and not is_expert(words) and not is_gate(words) and is_routing(table)
    assert parse_name(expert_name("query_layer", "up.bias", domain, "v")) == (
        domain, "v", "query_layer", "experts", "up.bias",
    )  # fmt: skip


def test_layers_have_numbers_but_the_query_layer():
    assert [block_index(block_name(i)) for i in (0, 12)] == [0, 12]
    assert [block_index(name) for name in (QUERY_LAYER, None, "", "blocks", "blocks.", "blocks.x")] == [None] * 6
    assert parse_name("blocks.12").layer == "blocks.12"


def test_related_tensors():
    name = expert_name("blocks.3", "up.weight", "law", "m")
    assert name == "domains.law.optimizer.m.blocks.3.experts.up.weight"
    assert of_domain(name, "code") == "domains.code.optimizer.m.blocks.3.experts.up.weight"
    assert of_domain(name, None) == "optimizer.m.blocks.3.experts.up.weight"
    assert dense_name("domains.law.blocks.3.experts.up.weight") == "blocks.3.feed_forward.up.weight"
    assert dense_name("domains.law.embedding.word") == dense_name("embedding.word") == "embedding.word"
    assert table_name("blocks.3", LAYER) == "blocks.3.routing" and parse_name("blocks.3.routing").owner == LAYER
    assert parse_name(chunk_name("blocks.3", "up.weight", 1)) == parse_name("blocks.3.experts.up.weight")
    assert probe_name("law") == "probe.law"
    assert is_gate("optimizer.m.blocks.3.router.noise_weight") and not is_gate("blocks.3.attention.query.weight")


def text_of(node: ast.AST) -> str | None:
    """The text of a string or an f-string, whose values are {}."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def name_building(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string, but docstrings, that is a piece of a tensor's name, of every comparison with a
    layer's and of every split at dots."""
    docstrings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    inside = {id(value) for value in docstrings if isinstance(value, ast.Constant)}
    inside |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = text_of(node)
        if text is not None and id(node) not in inside and " " not in text and NAME.search(text):
            yield node.lineno, text
        elif isinstance(node, ast.Compare) and QUERY_LAYER in map(text_of, (node.left, *node.comparators)):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            splits = node.func.attr in ("split", "rsplit", "partition", "rpartition")
            if splits and text_of(node.args[0]) == "." and ast.unparse(node.func.value) not in KEYS:
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize(
    "code",
    [
        'f"blocks.{i}"', 'name.split(".")', 'name.removeprefix(f"domains.{domain}.")', '".experts." in name',
        'name.endswith(".routing")', 'f"{layer}.attention.{part}.weight"', 'named["embedding.word"]',
        'f"optimizer.{kind}.{name}"', 'name.startswith("domains.")', 'f"{name}.gamma"', '".router." in name',
        'layer == "query_layer"',
    ],
)  # fmt: skip
def test_building_and_splitting_is_seen(code):
    assert list(name_building(ast.parse(code)))


def test_no_other_module_builds_or_splits_tensor_names():
    root = Path(__file__).parents[2]
    packages = ("parallel", "rre", "pangu_sigma", "extract")
    assert not [
        f"{file}:{line}: {text}"
        for file in (str(path.relative_to(root)) for package in packages for path in (root / package).rglob("*.py"))
        if not file.startswith(tuple(FOREIGN))
        for line, text in name_building(ast.parse((root / file).read_text(encoding="utf-8")))
    ]
