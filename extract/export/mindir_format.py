"""Export to MINDIR: two fixed graphs, prefill and decode, that hold the chosen domains' experts.

Whoever runs them needs only MindSpore (or MindSpore Lite) and what `graphs.json` says about their inputs and state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extract.export.export_formats import Options
from extract.export.export_source import ExportSource
from extract.export.mindir_guide import mindir_guide
from pangu_sigma import runtime
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.config.model_section import DomainParametersConfig
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress
from pangu_sigma.tensor_names import GATE, is_routing, table_name, tensor_name

if TYPE_CHECKING:
    from extract.export.static_layers import StaticShapes

SIGNATURES = ("plain", "sigma")
GRAPHS = ("prefill", "decode")


def check(source: ExportSource, options: Options) -> None:
    """Raises UserError for what these graphs cannot be."""
    model = source.config.model
    if options.signature not in SIGNATURES:
        raise UserError(f"'{options.signature}' is no signature; choose {', '.join(SIGNATURES)}")
    if options.capacity_factor is not None and (options.capacity_factor <= 0 or options.signature != "sigma"):
        raise UserError("the capacity factor is a number above 0 and belongs to the signature sigma; leave it out")
    if options.signature == "sigma":
        if model.sparse_prefixes and model.router_spec.learned:
            raise UserError(
                "the sigma signature takes expert ids from outside, and a learned gate makes them inside; leave "
                "the signature out"
            )
        if model.domain_parameters.embedding == "own" and len(source.domains) > 1:
            raise UserError(
                "the sigma signature knows one word embedding, and this model has one for each domain; choose one "
                "domain"
            )
    if source.config.data.sequence_length > model.positions:
        raise UserError("the model has fewer positions than its window; this checkpoint's config.yaml is not whole")


def weight_bytes(source: ExportSource, options: Options) -> int:
    """Bytes of the graphs, each of which holds all weights."""
    numbers = sum(math.prod(source.shape(name)) for name in source.names)
    if options.signature == "sigma":
        numbers += 2 * math.prod(shapes_of(source, options).cache)
    return len(GRAPHS) * 4 * numbers


@runtime.COMPUTING
def write(source: ExportSource, folder: Path, options: Options) -> list[str]:
    """Write the folder; returns what there is to say. Raises UserError, OSError."""
    runtime.prepare("CPU")
    import mindspore as ms

    from extract.export.mindir_graphs import build_graph, fill

    shapes = shapes_of(source, options)
    description: dict[str, object] = {}
    with progress("export", len(GRAPHS), unit="graphs") as job:
        for name in GRAPHS:
            graph = build_graph(shapes, options.signature, name)
            fill(graph.cell, side_by_side(source, options))
            ms.export(graph.cell, *graph.inputs.values(), file_name=str(folder / name), file_format="MINDIR")
            described = {
                "inputs": {n: _describe(t) for n, t in graph.inputs.items()},
                "outputs": graph.outputs,
                "state": {name: {"shape": list(shapes.cache), "type": "float32"} for name in graph.state},
            }
            description[_file_of(folder, name)] = described
            job.advance(1)
    source.tokenizer.save(folder / "tokenizer")
    if options.signature == "sigma" and shapes.model.sparse_prefixes:
        np.save(folder / "expert_ids.npy", expert_numbers(source))
    _write_description(source, shapes, options, description, folder)
    table = (folder / "expert_ids.npy").exists()
    guide = mindir_guide(source, options.signature, options.batch_size, list(description), list(graph.state), table)
    (folder / "README.md").write_text(guide, encoding="utf-8")
    return []


def shapes_of(source: ExportSource, options: Options) -> StaticShapes:
    """The shapes of the graphs of `source`."""
    from extract.export.static_layers import StaticShapes

    model, window = source.config.model, source.config.data.sequence_length
    capacity = window
    if options.capacity_factor is not None and model.sparse_prefixes:
        capacity = min(window, math.ceil(options.capacity_factor * window / sum(source.experts)))
    if len(source.domains) == 1:
        # The only domain's own words are as good as shared ones.
        model = model.model_copy(update={"domain_parameters": DomainParametersConfig()})
    return StaticShapes(
        model=model,
        vocab=source.vocab,
        window=window,
        batch=options.batch_size,
        eod_id=source.tokenizer.eod_id,
        experts=source.experts,
        capacity=capacity,
    )


def side_by_side(source: ExportSource, options: Options) -> dict[str, Callable[[], np.ndarray]]:
    """Parameter name -> how to read it: the shared tensors, and the chosen domains' experts, tables and word embeddings
    one after the other on the first axis. A table's numbers count the layer's experts."""
    weights_by_expert: dict[str, list[tuple[int, Callable[[], np.ndarray]]]] = {}
    for full, domain, parsed in source.by_owner():
        read, name = partial(_as_parameter, source, full, domain), str(parsed._replace(domain=None))
        if parsed.module == "embedding":
            name = parsed.tensor
        elif parsed.part == GATE:
            name = tensor_name(parsed.layer, "feed_forward", "router")
        elif parsed.module == "experts":
            name = tensor_name(parsed.layer, "feed_forward", "experts", parsed.tensor.replace(".", "_"))
        elif is_routing(full):
            if options.signature == "sigma":
                continue  # made outside, from expert_ids.npy
            name = tensor_name(parsed.layer, "feed_forward", "routing")
        # Names come sorted, domains not in the model's order.
        weights_by_expert.setdefault(name, []).append((domain or 0, read))
    return {name: partial(_joined, parts) for name, parts in weights_by_expert.items()}


def _as_parameter(source: ExportSource, name: str, domain: int | None) -> np.ndarray:
    array = as_float32(name, source.checkpoint.load([name])[name])
    if is_routing(name):
        return (array + sum(source.experts[:domain])).astype(np.int32)[None]
    return array


def _joined(parts: list[tuple[int, Callable[[], np.ndarray]]]) -> np.ndarray:
    arrays = [read() for _, read in sorted(parts, key=lambda part: part[0])]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def expert_numbers(source: ExportSource) -> np.ndarray:
    """int32 [sparse layers, domains, V]: `expert_ids[n, b, s] = numbers[n, domain of sample b, input_ids[b, s]]`."""
    tables = []
    for layer_name in source.config.model.sparse_prefixes:
        names = [table_name(layer_name, domain) for domain in source.domains]
        first = np.cumsum([0, *source.experts[:-1]]).astype(np.int32)
        loaded = source.checkpoint.load(names)
        tables.append(np.stack([loaded[name] + f for name, f in zip(names, first, strict=True)]))
    return np.stack(tables).astype(np.int32)


def _file_of(folder: Path, name: str) -> str:
    """The graph's file: MindSpore writes weights beyond 1 GiB into a folder beside it, and all of it read-only."""
    for path in folder.glob(f"{name}*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        for inner in path.rglob("*"):
            inner.chmod(0o644)
    return next(path.name for path in folder.glob(f"{name}*.mindir"))


def _describe(tensor) -> dict:
    return {"shape": list(tensor.shape), "type": str(tensor.dtype).lower()}


def _write_description(
    source: ExportSource, shapes: StaticShapes, options: Options, graphs: dict, folder: Path
) -> None:
    from extract.export.mindir_graphs import MEANINGS

    used = {name for graph in graphs.values() for part in ("inputs", "outputs", "state") for name in graph[part]}
    values = {
        "signature": options.signature,
        "graphs": graphs,
        "meanings": {name: meaning for name, meaning in MEANINGS.items() if name in used},
        "domains": list(source.domains),
        "experts": list(source.experts),
        "sparse_layers": list(shapes.model.sparse_prefixes),
        "window": shapes.window,
        "batch": shapes.batch,
        "capacity": shapes.capacity if options.signature == "sigma" and shapes.model.sparse_prefixes else None,
        "eod_id": source.tokenizer.eod_id,
        "pad_id": source.tokenizer.pad_id,
        "vocab_size": source.vocab,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / "graphs.json").write_text(text, encoding="utf-8")
