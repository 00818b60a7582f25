"""Tables of a routing analysis: CSV files, one per measure, and text for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.monitor.text_tables import number, text_table


def write_tables(folder: Path, result: dict) -> None:
    """Write saturation.csv, load.csv, domains.csv, vocabulary.csv and coactivation.csv into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = result["layers"].items()
    _write(folder / "saturation.csv", ("layer", "step", "domain", "saturation"), _saturation(layers))
    _write(
        folder / "load.csv", ("layer", "expert", "share"),
        ((layer_name, i, share) for layer_name, measures in layers for i, share in enumerate(measures["load"])),
    )  # fmt: skip
    _write(
        folder / "domains.csv", ("layer", "domain", "expert", "share"),
        (
            (layer_name, name, i, share)
            for layer_name, measures in layers
            for name, shares in measures["domain_specialisation"].items()
            for i, share in enumerate(shares)
        ),
    )  # fmt: skip
    _write(
        folder / "vocabulary.csv", ("layer", "expert", "token", "id", "share", "occurrences"),
        (
            (layer_name, i, *(token[key] for key in ("token", "id", "share", "occurrences")))
            for layer_name, measures in layers
            for i, tokens in enumerate(measures["favourites"])
            for token in tokens
        ),
    )  # fmt: skip
    _write(
        folder / "coactivation.csv", ("layer", "expert", "other", "share"),
        (
            (layer_name, pair["expert"], pair["other"], pair["share"])
            for layer_name, measures in layers
            for pair in measures["coactivation"]
        ),
    )  # fmt: skip


def _saturation(layers: Iterable[tuple[str, dict]]) -> Iterator[tuple]:
    for layer_name, measures in layers:
        for checkpoint in measures["saturation"]:
            yield layer_name, checkpoint["step"], "all", checkpoint["all"]
            for name, value in checkpoint["domains"].items():
                yield layer_name, checkpoint["step"], name, value


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def summary(result: dict) -> str:
    """One line per sparse layer: saturation of the first checkpoint, entropy, imbalance, specialisation, drops."""
    rows = []
    for layer_name, measures in result["layers"].items():
        strongest = measures["coactivation"][0]["share"] if measures["coactivation"] else None
        rows.append(
            [
                layer_name,
                number(measures["saturation"][0]["all"]),
                number(_mean(measures["entropy"])),
                number(max(measures["imbalance"].values()), 2),
                number(measures["vocabulary_specialisation"]),
                number(strongest),
                number(_mean(measures["dropped_share"])),
            ]
        )
    header = [
        "layer", f"saturation at {result['steps'][0]}", "entropy", "busiest × mean", "vocabulary", "co-activation",
        "dropped",
    ]  # fmt: skip
    return text_table(header, rows)


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
