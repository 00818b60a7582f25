"""What a spec says of a router is what its class and the packages do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from extract.export.export_formats import FORMATS
from parallel.operator_layout import Layout
from rre.router_specs import LAYER, MIXTURE_GATE, ROUTER_SPECS
from rre.routers import ExpertGroups, RouterOptions, build_router

ROOT = Path(__file__).parents[2]
SPECS = {**ROUTER_SPECS, MIXTURE_GATE.name: MIXTURE_GATE}
# Files that may hold a router's name: the specs; exported files, which run without these packages; Hugging Face's
# model_type.
NAMING = ("rre/router_specs.py", "extract/export/hf_files/", "pangu_sigma/convert/olmoe_names.py")


def test_no_file_but_the_specs_holds_a_routers_name():
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for package in ("parallel", "rre", "pangu_sigma", "extract")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(NAMING)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in SPECS
    ]
    assert named == []


@pytest.mark.parametrize("name", SPECS)
def test_a_gate_trains_the_weights_that_its_spec_names_and_a_table_router_none(name):
    spec = SPECS[name]
    groups = ExpertGroups(("code", "law"), (3, 2))
    options = RouterOptions(spec, groups, 6, 8, Layout(), top_k=spec.experts_per_token or groups.total, tables={})
    trained = {p.name: p.shape for p in build_router(options).cell().trainable_params()}
    assert trained == {weight.name: weight.shape(6, 5) for weight in spec.gate_weights}
    assert bool(trained) == spec.learned


def test_tables_belong_to_each_domain_or_to_the_layer():
    owners = {name: spec.table_owners(["code", "law"]) for name, spec in SPECS.items()}
    assert owners["rre"] == ("code", "law") and owners["hash"] == (LAYER,) and owners["switch"] == ()


def test_the_networks_that_a_spec_names_are_exported_and_every_format_knows_a_router():
    assert set().union(*(spec.exports for spec in SPECS.values())) == {f.network for f in FORMATS.values()}
