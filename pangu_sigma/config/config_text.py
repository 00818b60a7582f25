"""A configuration as text for people and for scripts, and the schema as a list of keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pangu_sigma.config.key_descriptions import default_of, inner_section, keys, meaning
from pangu_sigma.config.parameter_counts import ParameterCounts, parameter_counts
from pangu_sigma.config.rules import warnings
from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import INIT_FROM, RESUME, Section
from pangu_sigma.config.yaml_text import parse_yaml

_INTRODUCTION = (
    "`pangu-sigma config --describe` prints these keys. A file needs `schema_version`, `run.dir`, a size of the model",
    "(`model.preset`, or `layers`, `hidden`, `heads`, `ffn` and `positions`), a name and files for each domain, and",
    "`train.steps`; every other key has a default. Where the default is null and the text says \"null: …\", the value",
    "follows from other keys: `pangu-sigma config FILE.yaml` shows the whole configuration with what was filled in.",
)



def json_text(config: Config, vocabulary: int) -> str:
    """JSON with `config`, `vocabulary` (rows of the word embedding) and `parameters` (see `ParameterCounts`)."""
    counts = parameter_counts(config, vocabulary).to_dict()
    parts = {"config": config.to_dict(), "vocabulary": vocabulary, "parameters": counts}
    return json.dumps(parts, ensure_ascii=False, indent=2)


def yaml_text(config: Config, vocabulary: int, written: Mapping[str, Any]) -> str:
    """The configuration as YAML, what is not in the mapping `written` marked, with warnings and parameter counts as
    comments under it: the output is a configuration too."""
    lines = config.to_yaml().splitlines()
    for number, mark in _marks(config, written):
        lines[number] += f"  # {mark}"
    comments = [f"warning: {sentence}" for sentence in warnings(config)]
    comments += _count_lines(parameter_counts(config, vocabulary), vocabulary)
    return "\n".join([*lines, "", *(f"# {line}" for line in comments)])


def _marks(config: Config, written: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Line of the configuration's YAML -> "default", or "filled in" where the value follows from other keys, of every
    key that `written` does not have."""

    def visit(node: yaml.Node, values: Any, section: type[Section] | None) -> Iterator[tuple[int, str]]:
        if isinstance(node, yaml.SequenceNode):
            items = values if isinstance(values, list) else []
            for index, item in enumerate(node.value):
                yield from visit(item, items[index] if index < len(items) else None, section)
            return
        for name, value in node.value if section is not None and isinstance(node, yaml.MappingNode) else ():
            own = values.get(name.value) if isinstance(values, dict) else None
            field = section.model_fields[name.value]
            inner, _ = inner_section(field)
            if inner is not None and value.value and not isinstance(value, yaml.ScalarNode):
                yield from visit(value, own, inner)
            elif own is None and not (isinstance(values, dict) and name.value in values and value.value == "null"):
                plain = parse_yaml(default_of(field)) if not field.is_required() else None
                shown = parse_yaml(config_text[value.start_mark.index : value.end_mark.index])
                yield name.start_mark.line, "default" if shown == plain else "filled in"

    config_text = config.to_yaml()
    return visit(yaml.compose(config_text), written, Config)


def description() -> str:
    """The reference of all keys as Markdown: meaning, what is allowed, default, what `--resume` and `init_from` may."""
    lines = ["# Keys of the configuration", "", *_INTRODUCTION, ""]
    lines += ["What `--resume` may do with a key of the run's configuration:", ""]
    lines += [f"- {decision}: {meaning}" for decision, meaning in RESUME.items()]
    lines += ["", "What a new run may do with a key whose `run.init_from` names a model:", ""]
    lines += [f"- {decision}: {meaning}" for decision, meaning in INIT_FROM.items()]
    chapter = ""
    for key in keys():
        if chapter != (chapter := key.path.partition(".")[0].removesuffix("[]")):
            about = Config.model_fields[chapter]
            lines += ["", f"## {chapter}", ""]
            lines += [meaning(about), ""] if inner_section(about)[0] else []
        default = "required" if key.default == "required" else f"default {key.default}"
        lines.append(f"- `{key.path}`: {key.description}")
        lines.append(f"  {key.allowed}; {default}; `--resume`: {key.resume}; `init_from`: {key.init_from}")
    return "\n".join(lines)


def _count_lines(counts: ParameterCounts, rows: int) -> list[str]:
    width = len(f"{counts.total:,}")
    lines = [
        f"parameters with a vocabulary of {rows:,}:",
        f"  {counts.total:>{width},}  total",
        f"  {counts.shared:>{width},}  shared",
    ]
    for name, parameters in counts.per_domain.items():
        activated = counts.activated_per_token[name]
        lines.append(f"  {parameters:>{width},}  domain {name} ({activated:,} activated per token)")
    return [*lines, f"beside them {counts.routing_entries:,} entries of routing tables (integers, never trained)"]
