"""Decode step of compiled CPU kernels, one for each layer and the head: the same as `decode_graphs.DecodeStepGraph`.

Legend: B rows of the batch (one token of one text each), L positions that a cache holds, H heads, W head width, V
vocabulary.
"""

from __future__ import annotations

from mindspore import ParameterTuple, Tensor, nn, ops

from pangu_sigma.generation.decode_graphs import EmbeddingGraph, own_tables
from pangu_sigma.generation.inference_layers import InferenceCell, InferenceLayerNorm
from pangu_sigma.model.model import Model
from parallel.ops.compiled_decoding import CompiledDecodeHead, CompiledDecodeLayer


def has_compiled_step(model: Model) -> bool:
    """Whether compiled kernels are used (`run.kernels`) and cover the model: PanGu's parts, table routers, no shared
    expert."""
    config = model.config.model
    covered = config.has_pangu_parts and not model.learned and not config.sparse.shared_expert
    return model.layout.kernels is not None and covered


class CompiledDecodeStepGraph(InferenceCell):
    """Decode step graph with a compiled kernel for each layer and the head (`run.kernels`): inputs and outputs are
    `DecodeStepGraph`'s.

    What a cache holds from a row's position on does not matter, and no row's result depends on other rows.
    """

    def __init__(self, model: Model, rows: int) -> None:
        super().__init__()
        config, layout = model.config.model, model.layout
        named = {parameter.name: parameter for parameter in model.net.get_parameters()}
        prefixes = [f"blocks.{i}" for i in range(config.blocks)]
        self.blocks, self.layers = config.blocks, config.layers
        if config.blocks < config.layers:
            prefixes.append("query_layer")
            self.queries = named["embedding.query"]
        self.tables = rows if own_tables(model) else 0
        self.words = None if self.tables else named["embedding.word"]
        self.embed = EmbeddingGraph(model, self.tables)
        self.positions = named["embedding.position"]
        self.norm = InferenceLayerNorm(named, "norm", config, layout)
        network = config.network.tensors
        self.weights = tuple(
            ParameterTuple(
                named[f"{prefix}.{name}"] for name in _layer_names(() if prefix in config.sparse_prefixes else network)
            )
            for prefix in prefixes
        )
        sparse_index = {prefix: n for n, prefix in enumerate(config.sparse_prefixes)}
        size = len(network) * rows
        self.bounds = tuple(
            (self.tables + sparse_index[p] * size, self.tables + (sparse_index[p] + 1) * size)
            if p in sparse_index
            else (0, 0)
            for p in prefixes
        )
        self.run = nn.CellList(
            [
                CompiledDecodeLayer(
                    layout.kernels, config.heads, config.activation, config.norm_epsilon, prefix == "query_layer"
                )
                for prefix in prefixes
            ],
            auto_prefix=False,
        )
        self.head = CompiledDecodeHead(layout.kernels)
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.add = layout(ops.Add(), (1, 1), (1, 1))

    def construct(self, tokens: Tensor, positions: Tensor, *inputs: Tensor):
        flat = inputs[2 * self.layers :]
        h = self.add(self.embed(tokens, *flat[: self.tables]), self.take(self.positions, positions, 0))
        kept = ()
        for i in range(self.layers):
            queries = h
            if i == self.blocks:
                h = self.norm(h)
                queries = self.take(self.queries, positions, 0)
            start, end = self.bounds[i]
            h, key, value = self.run[i](
                h, queries, positions, inputs[2 * i], inputs[2 * i + 1], self.weights[i] + flat[start:end]
            )
            kept = kept + (key, value)
        if self.layers == self.blocks:
            h = self.norm(h)
        return (self.head(h, flat[: self.tables] if self.tables else (self.words,)), *kept)


def _layer_names(network: tuple[str, ...]) -> list[str]:
    """A layer's own tensors as `CompiledDecodeLayer` takes them; `network`: those of its own feed-forward network."""
    names = ["norm1.gamma", "norm1.beta"]
    names += [f"attention.{n}.{kind}" for n in ("query", "key", "value", "projection") for kind in ("weight", "bias")]
    names += ["norm2.gamma", "norm2.beta"]
    return names + [f"feed_forward.{name}" for name in network]
