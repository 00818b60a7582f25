"""Every shipped configuration loads, and every key in it is explained."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

from pangu_sigma.config import load_config
from pangu_sigma.config.finetuning_file import load_adaptation
from pangu_sigma.config.key_descriptions import keys

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS.parent / "benchmarks").glob("*.yaml")])
# They lie over a model's own configuration: objective -> file.
ADAPTATIONS = {objective: CONFIGS / f"{objective}.yaml" for objective in ("sft", "dpo")}


def test_there_are_shipped_configurations():
    assert {"quickstart.yaml", "two_stage.yaml", "four_domains.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_configuration_loads(path):
    if path in ADAPTATIONS.values():
        model = load_config(CONFIGS / "quickstart.yaml")
        config = load_adaptation(path, (), path.stem, model, model.run.dir)
        assert config.adapt.objective == path.stem and config.model == model.model
    else:
        load_config(path)


def test_the_quickstart_is_short_and_names_the_page_that_explains_every_key():
    text = (CONFIGS / "quickstart.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40 and "docs/configuration.md" in text


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.name != "quickstart.yaml"], ids=lambda path: path.name)
def test_every_key_of_a_shipped_configuration_is_commented(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    explained: set[str] = set()
    for line, before in zip(lines[1:], lines, strict=False):
        word = line.strip().removeprefix("- ").split(":")[0]
        if line.strip().startswith("#"):
            # `key: meaning` in a comment above a list explains the key in each of its items.
            explained.add(word.removeprefix("# ").strip())
        elif ":" in line and before.strip().removeprefix("- ").startswith("#"):
            explained.add(word)
    sections = {"run", "model", "sparse", "optimizer", "schedule", "train", "evaluate", "checkpoint", "domains"}
    sections |= {"data", "experts", "parallel", "adapt"}
    values = yaml.compose(path.read_text(encoding="utf-8"))
    missing = {key for key in _written(values) if key not in explained | sections}
    assert not missing, f"without a comment: {sorted(missing)}"


def _written(node) -> set[str]:
    if isinstance(node, yaml.SequenceNode):
        return set().union(*map(_written, node.value)) if node.value else set()
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        return {key.value for key, _ in node.value}.union(*(_written(value) for _, value in node.value))
    return set()


def test_what_is_made_of_the_schema_is_up_to_date():
    made = runpy.run_path(str(CONFIGS.parent / "docs/reference.py"))["made_files"]()
    old = [str(path) for path, content in made.items() if path.read_text(encoding="utf-8") != content]
    assert not old, f"renew {', '.join(old)}: make reference"


def test_the_fine_tuning_files_tell_the_schemas_defaults():
    files = (path.read_text(encoding="utf-8").splitlines() for path in ADAPTATIONS.values())
    comments = " ".join(line.strip().lstrip("- #") for lines in files for line in lines)
    for key in keys():
        if key.path.startswith("adapt."):
            default = "required" if key.default == "required" else f"default {key.default}"
            assert f"{key.description} ({key.allowed}; {default})" in comments, key.path
