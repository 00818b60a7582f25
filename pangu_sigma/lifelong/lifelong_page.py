"""The measurement as one self-contained HTML page: property table, matrix, measures, costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from pangu_sigma.lifelong.lifelong_results import Results
from pangu_sigma.lifelong.loss_heat_map import heat_map
from pangu_sigma.monitor.text_tables import number
from pangu_sigma.report.html_page import render_page

_MEANINGS = {
    "backward transfer": "quality at the end against right after learning; below 0: later stages cost it",
    "forgetting": "best quality of any earlier stage against the end; above 0: something was lost",
    "forward transfer": "quality just before its stage against the untrained model",
    "learned loss": "loss right after learning, lower is better",
    "final loss": "loss at the end, lower is better",
}


def render(results: Results, name: str) -> str:
    """The page as text; `name` is the measurement's."""
    planned = len(results.plan["stages"])
    state = f"{planned} stages" if results.complete else f"{len(results.rows)} of {planned} stages so far"
    model = results.plan["base"]["model"]
    router = model["sparse"]["router"] if results.costs and _sparse(model) else "dense"
    return render_page(
        "lifelong/lifelong_page.html", title=name, sections=_sections(results), domains=results.domains,
        meanings=_MEANINGS, summary=f"{state} · {len(results.domains)} domains · {router} · {_policies(results)}",
    )  # fmt: skip


def _sections(results: Results) -> Iterator[tuple[str, str, Any]]:
    """(anchor, title, data for the template)."""
    if results.rows:
        yield "properties", "Lifelong-learning properties", results.properties
    rows = [[name, *(number(row[d]["loss"]) for d in results.domains)] for name, row in results.named_rows()]
    svg = Markup(heat_map([results.panel]))
    yield "matrix", "Loss after every stage", {"svg": svg, "domains": results.domains, "rows": rows}
    if results.rows:
        yield "measures", "Transfer and forgetting", results.measure_rows()
        floors = [floor.row() for floor in results.floors]
        yield "floors", "Every domain beside a count of its tokens", {"rows": floors, "warnings": results.warnings}
        yield "costs", "What every stage cost", results.cost_rows(with_moments=True)
        yield "learning", "Learning as the text comes", list(_learning(results))


def _learning(results: Results) -> Iterator[list[str]]:
    for name, stage in zip(results.stages, results.learning, strict=True):
        for domain, result in stage.items():
            yield [f"{name}: {domain}", number(result["passes"], 2), number(result["online_loss"])]


def _policies(results: Results) -> str:
    """What the stages after the first do with what was learned before, in a few words."""
    sentences = []
    for stage in results.plan["stages"][1:]:
        policy = stage["policy"]
        replay = f" with {100 * policy['replay']:.0f} % replay" if policy["replay"] else ""
        penalties = {k: v for k, v in (policy["regularise"] or {}).items() if v and k in ("output", "l2", "ewc")}
        by = f" ({', '.join(f'{key} {weight:g}' for key, weight in penalties.items())})" if penalties else ""
        sentences.append(f"shared parameters {policy['shared']}{by}{replay}")
    return ", ".join(dict.fromkeys(sentences)) or "one stage"


def _sparse(model: dict) -> bool:
    return bool(model["sparse"]["layers"]) or model["sparse"]["pattern"] != "top"
