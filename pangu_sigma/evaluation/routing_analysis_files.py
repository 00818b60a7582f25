"""The analysis as CSV files, one per measure, and as text for the terminal."""

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
        ((layer_name, i, share) for layer_name, found in layers for i, share in enumerate(found["load"])),
    )  # fmt: skip
    _write(
        folder / "domains.csv", ("layer", "domain", "expert", "share"),
        (
            (layer_name, name, i, share)
            for layer_name, found in layers
            for name, shares in found["domain_specialisation"].items()
            for i, share in enumerate(shares)
        ),
    )  # fmt: skip
    _write(
        folder / "vocabulary.csv", ("layer", "expert", "token", "id", "share", "occurrences"),
        (
            (layer_name, i, *(token[key] for key in ("token", "id", "share", "occurrences")))
            for layer_name, found in layers
            for i, tokens in enumerate(found["favourites"])
            for token in tokens
        ),
    )  # fmt: skip
    _write(
        folder / "coactivation.csv", ("layer", "expert", "other", "share"),
        (
            (layer_name, pair["expert"], pair["other"], pair["share"])
            for layer_name, found in layers
            for pair in found["coactivation"]
        ),
    )  # fmt: skip


def _saturation(layers: Iterable[tuple[str, dict]]) -> Iterator[tuple]:
    for layer_name, found in layers:
        for at in found["saturation"]:
            yield layer_name, at["step"], "all", at["all"]
            for name, value in at["domains"].items():
                yield layer_name, at["step"], name, value


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def summary(result: dict) -> str:
    """One line per sparse layer: saturation of the first checkpoint, entropy, imbalance, specialisation, drops."""
    rows = []
    for layer_name, found in result["layers"].items():
        strongest = found["coactivation"][0]["share"] if found["coactivation"] else None
        rows.append(
            [
                layer_name,
                number(found["saturation"][0]["all"]),
                number(_mean(found["entropy"])),
                number(max(found["imbalance"].values()), 2),
                number(found["vocabulary_specialisation"]),
                number(strongest),
                number(_mean(found["dropped_share"])),
            ]
        )
    header = [
        "layer", f"saturation at {result['steps'][0]}", "entropy", "busiest × mean", "vocabulary", "co-activation",
        "dropped",
    ]  # fmt: skip
    return text_table(header, rows)


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
