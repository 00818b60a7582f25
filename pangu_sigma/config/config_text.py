"""A configuration as text for people and for scripts, and the schema as a list of keys."""

from __future__ import annotations

import json

from pangu_sigma.config.key_descriptions import keys
from pangu_sigma.config.parameter_counts import ParameterCounts, parameter_counts
from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import INIT_FROM, RESUME


def json_text(config: Config, vocabulary: int) -> str:
    """JSON with `config`, `vocabulary` (rows of the word embedding) and `parameters` (see `ParameterCounts`)."""
    counts = parameter_counts(config, vocabulary).to_dict()
    parts = {"config": config.to_dict(), "vocabulary": vocabulary, "parameters": counts}
    return json.dumps(parts, ensure_ascii=False, indent=2)


def yaml_text(config: Config, vocabulary: int) -> str:
    """The configuration as YAML with the parameter counts as comments under it: the output is a configuration too."""
    counts = parameter_counts(config, vocabulary)
    comments = "\n".join(f"# {line}" for line in _count_lines(counts, vocabulary))
    return f"{config.to_yaml()}\n{comments}"


def description() -> str:
    """The reference of all keys as Markdown: meaning, what is allowed, default, what `--resume` and `init_from` may."""
    lines = ["# Keys of the configuration", "", "`pangu-sigma config --describe` prints this page."]
    lines += ["", "What `--resume` may do with a key of the run's configuration:", ""]
    lines += [f"- {decision}: {meaning}" for decision, meaning in RESUME.items()]
    lines += ["", "What a new run may do with a key whose `run.init_from` names a model:", ""]
    lines += [f"- {decision}: {meaning}" for decision, meaning in INIT_FROM.items()]
    chapter = ""
    for key in keys():
        if chapter != (chapter := key.path.partition(".")[0].removesuffix("[]")):
            lines += ["", f"## {chapter}", ""]
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
