"""Comparison of what two commits wrote: metrics and tensors to the bit, text files by their lines."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Metrics that hold a time, a speed, a path or the size of files in which names stand.
_NOT_COMPARED = re.compile(r"seconds|_per_second|hit_rate|(^|\.)path$|bytes_(written|linked)$")
_TEXT = {".json", ".md", ".py", ".txt", ".yaml"}
_LISTED = 5  # differences that a table names
_ONNX_TOKENS = 16

Column = tuple[tuple[str, str], ...]  # (step or line, value) of one metric


@dataclass(frozen=True)
class Comparison:
    """One row of the table: `compared` says how much was looked at; `differences` fail, `notes` do not."""

    name: str
    compared: str
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_metrics(old: Path, new: Path) -> Comparison:
    """Compare all numbers of two metrics.jsonl files, except times, speeds and sizes of files."""
    tables = [_columns(_records(path)) for path in (old, new)]
    rows = {step for column in tables[1].values() for step, _ in column}
    return _compare_columns("metrics.jsonl", f"{len(rows)} steps", *tables)


def compare_json(name: str, old: Path, new: Path) -> Comparison:
    """Compare all values of two files that hold one JSON object each."""
    tables = [_columns([_parse(path.read_text(encoding="utf-8"))]) for path in (old, new)]
    return _compare_columns(name, "", *tables)


def compare_folders(name: str, old: Path, new: Path) -> list[Comparison]:
    """Compare every file of two folders: tensors, weights byte for byte, text by lines. One row a file of weights."""
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (old, new)]
    missing = [f"{file}: only in OLD" for file in sorted(files[0] - files[1])]
    missing += [f"{file}: only in NEW" for file in sorted(files[1] - files[0])]
    if not files[0] | files[1]:
        missing = [f"{old} and {new} hold no files"]
    common = sorted(files[0] & files[1])
    texts = [file for file in common if Path(file).suffix in _TEXT]
    changed = [note for file in texts for note in _compare_text(file, old / file, new / file)]
    rows = [Comparison(f"{name}: text files", f"{len(texts)} files", tuple(missing), tuple(changed))]
    for file in common:
        if file in texts:
            continue
        if file.endswith(".safetensors"):
            tables = [read_tensors(folder / file) for folder in (old, new)]
            rows.append(Comparison(f"{name}: {file}", f"{len(tables[1])} tensors", tuple(_differences(*tables))))
        elif file.endswith(".mindir"):
            tables = [read_mindir(folder / file) for folder in (old, new)]
            rows.append(
                Comparison(f"{name}: {file}", f"{len(tables[1])} parameters, operators", tuple(_differences(*tables)))
            )
        elif file.endswith(".onnx"):
            tables = [run_onnx(folder / file) for folder in (old, new)]
            rows.append(
                Comparison(f"{name}: {file}", f"{len(tables[1])} inputs, outputs", tuple(_differences(*tables)))
            )
        elif not file.endswith(".onnx.data"):  # the weights of a graph that was run
            same = (old / file).read_bytes() == (new / file).read_bytes()
            size = (new / file).stat().st_size
            rows.append(Comparison(f"{name}: {file}", f"{size:,} bytes", () if same else ("bytes differ",)))
    return rows


def read_tensors(path: Path) -> dict[str, str]:
    """Tensor name -> type, shape and sha256 of a safetensors file (https://github.com/huggingface/safetensors)."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        digest = hashlib.sha256(data[start + first : start + last]).hexdigest()
        tensors[name] = f"{entry['dtype']} {entry['shape']} {digest}"
    return tensors


def read_mindir(path: Path) -> dict[str, str]:
    """Parameter name -> type, shape and sha256, and how often each operator stands in the graph.

    Names inside the graph begin with the module of the exported class, so the file's bytes say nothing.
    """
    from mindspore.train.mind_ir_pb2 import ModelProto

    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    contents = {}
    for parameter in model.graph.parameter:
        digest = hashlib.sha256(parameter.raw_data).hexdigest()
        contents[parameter.name.rpartition(":")[2]] = f"{parameter.data_type} {list(parameter.dims)} {digest}"
    # `REF::MatMul:16`: the number counts primitives from export to export.
    operators = Counter(re.sub(r":\d+$", "", node.op_type) for node in model.graph.node)
    del operators["Constant"]  # a constant computes nothing, and may serve several operators
    return contents | {f"operator {name}": str(count) for name, count in operators.items()}


def run_onnx(path: Path) -> dict[str, str]:
    """Name -> type and shape of each input of an exported graph, and sha256 of each output for a short text.

    Graphs that are made in another way give the same numbers by other operators.
    """
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    ids = np.arange(_ONNX_TOKENS, dtype=np.int64)[None]
    of_text = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    of_text |= {"past_documents": np.zeros((1, 0), np.int64), "next_document": np.ones(1, np.int64)}
    contents, feed = {}, {}
    for each in session.get_inputs():
        contents[f"input {each.name}"] = f"{each.type} {each.shape}"
        if each.name.startswith("past_key_values"):
            feed[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        else:
            feed[each.name] = of_text[each.name]
    for each, array in zip(session.get_outputs(), session.run(None, feed), strict=True):
        contents[f"output {each.name}"] = f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return contents


def results_table(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as a Markdown table, differences and notes below it."""
    lines = ["| compared | content | result |", "| --- | --- | --- |"]
    details = []
    for row in comparisons:
        result = f"DIFFERENT ({len(row.differences)})" if row.differences else "equal"
        if row.notes:
            result += f", {len(row.notes)} noted"
        lines.append(f"| {row.name} | {row.compared} | {result} |")
        for label, entries in (("DIFFERENT", row.differences), ("noted", row.notes)):
            details += [f"{label}: {row.name}: {entry}" for entry in entries[:_LISTED]]
            if len(entries) > _LISTED:
                details.append(f"{label}: {row.name}: and {len(entries) - _LISTED} more")
    return "\n".join([*lines, "", *details]) if details else "\n".join(lines)


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys((*old, *new)):
        if name not in new:
            yield f"{name}: only in OLD"
        elif name not in old:
            yield f"{name}: only in NEW"
        elif old[name] != new[name]:
            yield f"{name}: {_shortened(old[name])} became {_shortened(new[name])}"


def _shortened(description: str) -> str:
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", description)


def _compare_text(file: str, old: Path, new: Path) -> Iterator[str]:
    if old.read_bytes() == new.read_bytes():
        return
    lines = [path.read_text(encoding="utf-8").splitlines() for path in (old, new)]
    # The first two lines of a diff are its heads.
    changed = [line for line in list(difflib.unified_diff(*lines, lineterm="", n=0))[2:] if not line.startswith("@@")]
    yield f"{file}: {len(changed)} lines differ, e.g. {changed[0] if changed else 'line ends'}"


def _records(path: Path) -> list[dict[str, Any]]:
    return [_parse(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _parse(text: str) -> dict[str, Any]:
    # Numbers stay as they are written: Python writes a float so that it is read back to the bit, and NaN equals NaN.
    return json.loads(text, parse_float=str, parse_int=str, parse_constant=str)


def _columns(records: Iterable[dict[str, Any]]) -> dict[str, Column]:
    """Name -> its values over the records; the name begins with the record's kind."""
    columns: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        kind, step = record.get("kind", ""), record.get("step", "")
        for path, value in _leaves(record, ""):
            if path not in ("kind", "step") and not _NOT_COMPARED.search(path):
                columns.setdefault(f"{kind} {path}".strip(), []).append((step, value))
    return {name: tuple(column) for name, column in columns.items()}


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(value)


def _compare_columns(name: str, compared: str, old: Mapping[str, Column], new: Mapping[str, Column]) -> Comparison:
    only_new = {column: values for column, values in new.items() if column not in old}
    differences, notes = [], []
    for column, values in old.items():
        if column not in new:
            renamed = next((other for other, others in only_new.items() if others == values), None)
            if renamed is None:
                differences.append(f"{column}: only in OLD")
            else:
                only_new.pop(renamed)
                notes.append(f"{column} is called {renamed}")
        elif values != new[column]:
            differences.append(f"{column}: {_first_difference(values, new[column])}")
    differences += [f"{column}: only in NEW" for column in only_new]
    amount = sum(len(values) for values in new.values())
    if not old and not new:
        differences.append("no values")
    return Comparison(name, f"{compared}, {amount:,} values".lstrip(", "), tuple(differences), tuple(notes))


def _first_difference(old: Column, new: Column) -> str:
    if [step for step, _ in old] != [step for step, _ in new]:
        return f"{len(old)} values at steps unlike {len(new)}"
    step, first, second = next((step, a, b) for (step, a), (_, b) in zip(old, new, strict=True) if a != b)
    return f"{first} became {second}" + (f" at step {step}" if step else "")
