"""Renews what is made from the configuration's schema and the routers' specs: docs/configuration.md, the tables of
docs/routers.md, and configs/quickstart.yaml around its values. `make reference` runs it; a test holds the files against
it.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from extract.export.export_formats import FORMATS
from pangu_sigma.config import Config
from pangu_sigma.config.config_text import description
from pangu_sigma.config.key_descriptions import allowed, default_of, inner_section, meaning
from pangu_sigma.config.section import Section
from pangu_sigma.config.yaml_text import parse_yaml
from rre.router_specs import MIXTURE_GATE, ROUTER_SPECS, RouterSpec

ROOT = Path(__file__).parents[1]
QUICKSTART, ROUTERS = ROOT / "configs/quickstart.yaml", ROOT / "docs/routers.md"
FORMULAS = ("router", "chooses", "combine weights", "auxiliary loss", "from")
SUPPORT = (
    "router", "dispatch `capacity`", "store `host`, `disk`", "a graph cut over devices", "generation",
    "`extract`, `domains add`", "export",
)  # fmt: skip


def made_files() -> dict[Path, str]:
    """The content of every file that is made."""
    text = QUICKSTART.read_text(encoding="utf-8")
    header, _, _ = text.partition("\n\n# Version")
    lines = "\n".join(written(Config, parse_yaml(text), ""))
    return {
        QUICKSTART: f"{header}\n{lines}\n",
        ROOT / "docs/configuration.md": description() + "\n",
        ROUTERS: with_router_tables(ROUTERS.read_text(encoding="utf-8")),
    }


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


def with_router_tables(page: str) -> str:
    """The page with the tables between its markers as the specs say."""
    specs = {**ROUTER_SPECS, "model.top_layer: mixture": MIXTURE_GATE}
    tables = {
        "formulas": table(FORMULAS, (formula(spec) for spec in ROUTER_SPECS.values())),
        "support": table(SUPPORT, (support(name, spec) for name, spec in specs.items())),
    }
    return re.sub(r"(<!-- (\w+): .*? -->\n).*?(?=<!-- end -->)", lambda m: m[1] + tables[m[2]], page, flags=re.DOTALL)


def formula(spec: RouterSpec) -> Sequence[str]:
    """A router's row of the table of formulas."""
    return f"`{spec.name}`", spec.chooses, spec.combine_weights, spec.auxiliary_loss, spec.source


def support(name: str, spec: RouterSpec) -> Sequence[str]:
    """A router's row of the table of what works with what."""
    has = (spec.has_capacity, not spec.needs_all_experts, spec.has_mesh_form, spec.causal, spec.separates_domains)
    cells = ["yes" if holds else "no" for holds in has]
    without = [f"`{option.name}: {value}`" for option in spec.options for value in option.not_on_mesh]
    if without:
        cells[2] += f" (not {', '.join(without)})"
    formats = sorted(name for name, format_ in FORMATS.items() if format_.network in spec.exports)
    return f"`{name}`", *cells, ", ".join(f"`{name}`" for name in formats) or "no"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    for path, content in made_files().items():
        path.write_text(content, encoding="utf-8")
