"""Renews docs/configuration.md, which is made from the configuration's schema and the routers' specs. `make reference`
runs it; a test holds the page against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pangu_sigma.config.config_text import description
from rre.router_specs import MIXTURE_GATE, ROUTER_SPECS, RouterSpec

PAGE = Path(__file__).with_name("configuration.md")
FORMULAS = ("router", "chooses", "combine weights", "auxiliary loss", "from")
SUPPORT = (
    "router", "dispatch `capacity`", "store `host`, `disk`", "a graph cut over devices", "generation",
    "`extract`, `domains add`", "export as",
)  # fmt: skip


def made_files() -> dict[Path, str]:
    """The content of every file that is made."""
    return {PAGE: f"{description()}\n\n{router_tables()}"}


def router_tables() -> str:
    """The chapter of routers as their specs say."""
    specs = {**ROUTER_SPECS, "model.top_layer: mixture": MIXTURE_GATE}
    return (
        "## routers\n\nWhat `model.sparse.router` may be; [routers.md](routers.md#formulas) explains the letters.\n\n"
        f"{table(FORMULAS, (formula(spec) for spec in ROUTER_SPECS.values()))}\n"
        "What they work with, beside dropless dispatch, the store `device` and several CPU processes, which all do; "
        "[routers.md](routers.md#what-works-with-what) says why not, [export.md](export.md) which formats write which "
        f"network:\n\n{table(SUPPORT, (support(name, spec) for name, spec in specs.items()))}"
    )


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
    return f"`{name}`", *cells, ", ".join(spec.exports) or "no"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    for path, content in made_files().items():
        path.write_text(content, encoding="utf-8")
