"""The report's section on routing, from what `pangu-sigma analyze` wrote: tables, curves and heat maps per layer."""

from collections.abc import Iterator, Mapping, Sequence

from pangu_sigma.monitor.text_tables import number
from pangu_sigma.report.html_tables import cell, table
from pangu_sigma.report.line_chart import Chart, ChartLine, line_chart

DRAWN_EXPERTS = 64  # a layer with more experts is in the CSV files alone
NAMED_TOKENS = 5


def routing_section(analysis: Mapping) -> str:
    """HTML of everything the analysis found."""
    layers = analysis["layers"]
    parts = [
        f"<p>Held-out text of every domain under its own experts, router {cell(analysis['router'])}; the tables of all "
        "figures are in the folder analysis/ of the run.</p>",
        _summary(analysis),
        _saturation(analysis),
    ]
    for layer_name, measures in layers.items():
        parts.append(f'<p class="next">{cell(layer_name)}:</p><div class="maps">{"".join(_maps(measures))}</div>')
        parts.append(_favourites(measures))
    return "".join(parts)


def _summary(analysis: Mapping) -> str:
    rows = []
    for layer_name, measures in analysis["layers"].items():
        drops = measures["dropped_share"].values()
        strongest = measures["coactivation"][0]["share"] if measures["coactivation"] else None
        rows.append(
            [
                cell(layer_name),
                number(sum(measures["entropy"].values()) / len(measures["entropy"])),
                number(max(measures["imbalance"].values()), 2),
                number(measures["vocabulary_specialisation"]),
                number(strongest),
                number(sum(drops) / len(drops)) if drops else "–",
            ]
        )
    header = [
        "Layer", "Entropy of loads (1 = even)", "Busiest expert over mean", "Vocabulary specialisation",
        "Strongest co-activation", "Dropped in training",
    ]  # fmt: skip
    return table(header, rows, "Routing by layer")


def _saturation(analysis: Mapping) -> str:
    if len(analysis["steps"]) < 2:
        return "<p>Saturation compares checkpoints, and the run keeps one: checkpoint.keep says how many.</p>"
    lines = [
        ChartLine(
            layer_name, [(point["step"], point["all"]) for point in measures["saturation"]], f"s{index % 8}", marks=True
        )
        for index, (layer_name, measures) in enumerate(analysis["layers"].items())
    ]
    chart = Chart("Router saturation over the steps", width=760, height=260, end_labels=len(lines) <= 8)
    return (
        '<p class="next">Router saturation: the share of the last checkpoint\'s choices that each checkpoint made '
        f'already.</p><div class="card">{line_chart(lines, chart)}</div>'
    )


def _maps(measures: Mapping) -> Iterator[str]:
    specialisation = measures["domain_specialisation"]
    experts = len(measures["load"])
    if experts > DRAWN_EXPERTS:
        yield f"<p>{experts:,} experts: see domains.csv and coactivation.csv.</p>"
        return
    yield _heat("Share of each domain's tokens by expert", specialisation, [str(i) for i in range(experts)])
    if measures["coactivation"]:
        shares = [[0.0] * experts for _ in range(experts)]
        for pair in measures["coactivation"]:
            shares[pair["expert"]][pair["other"]] = pair["share"]
        names = [str(i) for i in range(experts)]
        yield _heat("Co-activation: of a row's tokens, the share that takes the column's expert too",
                    dict(zip(names, shares, strict=True)), names)  # fmt: skip


def _heat(title: str, rows: Mapping[str, Sequence[float]], columns: Sequence[str]) -> str:
    largest = max((value for row in rows.values() for value in row), default=0.0) or 1.0
    cells = [
        [cell(name)] + [f'<td style="--a:{0.8 * value / largest:.2f}">{value:.2f}</td>' for value in row]
        for name, row in rows.items()
    ]
    return f'<div class="card"><h3>{title}</h3>{table(["", *columns], cells, title, "matrix")}</div>'


def _favourites(measures: Mapping) -> str:
    rows = []
    for expert, tokens in enumerate(measures["favourites"][:DRAWN_EXPERTS]):
        named = ", ".join(f"{cell(t['token'])} ({t['share']:.0%} of {t['occurrences']})" for t in tokens[:NAMED_TOKENS])
        rows.append([str(expert), f'<td class="text">{named or "–"}</td>'])
    header = ["Expert", '<span class="text">Tokens of which it takes the largest share</span>']
    return table(header, rows, "Tokens by expert", "log")
