"""Renews what is made from the configuration's schema: docs/configuration.md, and configs/quickstart.yaml around its
values. `make reference` runs it; a test holds both files against it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pangu_sigma.config import Config
from pangu_sigma.config.config_text import description
from pangu_sigma.config.key_descriptions import allowed, default_of, inner_section, meaning
from pangu_sigma.config.section import Section
from pangu_sigma.config.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"


def made_files() -> dict[Path, str]:
    """The content of every file that is made."""
    text = QUICKSTART.read_text(encoding="utf-8")
    header, _, _ = text.partition("\n\n# Version")
    lines = "\n".join(written(Config, parse_yaml(text), ""))
    return {QUICKSTART: f"{header}\n{lines}\n", ROOT / "docs/configuration.md": description() + "\n"}


def written(section: type[Section], values: dict[str, Any], indent: str) -> Iterator[str]:
    """The lines of a section with every key, each under its meaning, what is allowed and its default."""
    for name, field in section.model_fields.items():
        default = default_of(field)
        value = values[name] if name in values else parse_yaml(default)
        inner, is_list = inner_section(field)
        if not indent:
            yield ""
        told = meaning(field)
        if inner is None or not value:
            told += f" ({allowed(field)}; {default if default == 'required' else f'default {default}'})"
        mark = f"{indent}# "
        yield from textwrap.wrap(told, 120, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)
        if inner is None or not value:
            yield f"{indent}{name}: {plain(value)}"
            continue
        yield f"{indent}{name}:"
        if not is_list:
            yield from written(inner, value, indent + "  ")
            continue
        first, *rest = written(inner, value[0], indent + "    ")
        yield from (f"{indent}  - {first.strip()}", *rest)
        if value[1:]:
            yield f"{indent}  # The same keys for the others."
        for item in value[1:]:
            first, *rest = [f"{key}: {plain(inner_value)}" for key, inner_value in item.items()]
            yield from (f"{indent}  - {first}", *(f"{indent}    {line}" for line in rest))


def plain(value: Any) -> str:
    """A value as YAML, on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    return value if isinstance(value, str) and parse_yaml(value) == value else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    for path, content in made_files().items():
        path.write_text(content, encoding="utf-8")
