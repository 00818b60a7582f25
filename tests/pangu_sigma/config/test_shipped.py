"""Every shipped configuration loads, and every key in it is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pangu_sigma.config import load_config
from pangu_sigma.config.finetuning_file import load_adaptation
from pangu_sigma.config.key_descriptions import keys
from pangu_sigma.config.yaml_text import parse_yaml

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


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
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


def test_the_quickstart_writes_every_key_of_the_schema():
    values = parse_yaml((CONFIGS / "quickstart.yaml").read_text(encoding="utf-8"))
    for key in keys():
        section = values
        for step in key.path.split("."):
            name = step.removesuffix("[]")
            assert name in section, f"{key.path} is not written"
            section = section[name][0] if step.endswith("[]") and section[name] else section[name]
            if not isinstance(section, dict):
                break


def _comments(path: Path) -> str:
    return " ".join(line.strip().lstrip("- #") for line in path.read_text(encoding="utf-8").splitlines())


def test_the_quickstart_tells_the_schemas_defaults():
    text = _comments(CONFIGS / "quickstart.yaml")
    adaptations = " ".join(_comments(path) for path in ADAPTATIONS.values())
    for key in keys():
        if key.path.startswith("adapt."):
            default = "required" if key.default == "required" else f"default {key.default}"
            assert f"{key.description} ({key.allowed}; {default})" in adaptations, key.path
            continue
        if key.path.startswith(("run.profile.", "data.stream.", "train.phases[].")):
            continue
        default = "required" if key.default == "required" else f"default {key.default}"
        assert f"{key.description} ({key.allowed}; {default})" in text, key.path
