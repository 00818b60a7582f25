"""What the report shows of the routing that `pangu-sigma analyze` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pangu_sigma.monitor.text_tables import number
from pangu_sigma.report.line_chart import Chart, ChartLine, line_chart, line_styles

DRAWN_EXPERTS = 64  # a layer with more experts is in the CSV files alone
NAMED_TOKENS = 5
Map = tuple[str, list[str], Mapping[str, Sequence[float]]]


def routing_tables(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """`summary`: rows of a table, a layer each. `saturation`: curves, where there are checkpoints to compare, with the
    `entries` of their legend. `layers`: (name, heat maps as (title, columns, rows), each expert's tokens)."""
    measures = analysis["layers"]
    styles = line_styles(len(measures))
    lines = [
        ChartLine(layer, [(point["step"], point["all"]) for point in of_layer["saturation"]], style, marks=True)
        for (layer, of_layer), style in zip(measures.items(), styles, strict=True)
    ]
    compared = len(analysis["steps"]) > 1
    return {
        "summary": [[layer, *_summary(of_layer)] for layer, of_layer in measures.items()],
        "saturation": line_chart(lines, Chart("Router saturation", width=760, height=260)) if compared else None,
        "entries": list(zip(measures, styles, strict=True)),
        "layers": [
            (layer, list(_maps(of_layer)), [tokens[:NAMED_TOKENS] for tokens in of_layer["favourites"][:DRAWN_EXPERTS]])
            for layer, of_layer in measures.items()
        ],
    }


def _summary(measures: Mapping[str, Any]) -> list[str]:
    drops, strongest = measures["dropped_share"].values(), measures["coactivation"]
    return [
        number(sum(measures["entropy"].values()) / len(measures["entropy"])),
        number(max(measures["imbalance"].values()), 2),
        number(measures["vocabulary_specialisation"]),
        number(strongest[0]["share"] if strongest else None),
        number(sum(drops) / len(drops) if drops else None),
    ]


def _maps(measures: Mapping[str, Any]) -> Iterator[Map]:
    experts = len(measures["load"])
    if experts > DRAWN_EXPERTS:
        return
    names = [str(i) for i in range(experts)]
    yield "Share of each domain's tokens by expert", names, measures["domain_specialisation"]
    if measures["coactivation"]:
        shares = {name: [0.0] * experts for name in names}
        for pair in measures["coactivation"]:
            shares[str(pair["expert"])][pair["other"]] = pair["share"]
        yield "Co-activation: of a row's tokens, the share that takes the column's expert too", names, shares
