"""A configuration as text for people and for scripts, and the schema as a list of keys."""

from __future__ import annotations

import json

from pangu_sigma.config.key_descriptions import keys
from pangu_sigma.config.parameter_counts import ParameterCounts, parameter_counts
from pangu_sigma.config.schema import Config


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
    """Every key with its meaning, what is allowed and its default, one paragraph a key."""
    paragraphs = (f"{key.path}\n    {key.description}\n    {key.allowed}; default: {key.default}" for key in keys())
    return "\n".join(paragraphs)


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
