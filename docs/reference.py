"""Renews what is made from the configuration's schema and the routers' specs: docs/configuration.md and the tables of
docs/routers.md. `make reference` runs it; a test holds the files against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from extract.export.export_formats import FORMATS
from pangu_sigma.config.config_text import description
from rre.router_specs import MIXTURE_GATE, ROUTER_SPECS, RouterSpec

ROOT = Path(__file__).parents[1]
ROUTERS = ROOT / "docs/routers.md"
FORMULAS = ("router", "chooses", "combine weights", "auxiliary loss", "from")
SUPPORT = (
    "router", "dispatch `capacity`", "store `host`, `disk`", "a graph cut over devices", "generation",
    "`extract`, `domains add`", "export",
)  # fmt: skip


def made_files() -> dict[Path, str]:
    """The content of every file that is made."""
    return {
        ROOT / "docs/configuration.md": description() + "\n",
        ROUTERS: with_router_tables(ROUTERS.read_text(encoding="utf-8")),
    }


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
