"""The graphs that are exported, by the inputs they take: our own, and that of Huawei's deployed PanGu-Σ.

Both come as a pair: a window that answers and fills caches, and one token that goes on from them. Of our own, caches
are inputs and outputs. The deployed signature (MindSpore Lite's graph optimisation `pangu_sigma` knows it) has routing,
mask and positions made outside the network: both levels of routing are a table look-up of token ids. It has no caches,
so they are parameters inside the graphs, which every call writes.

Legend: B samples, S positions of the window, T rows, D hidden width, V vocabulary, L layers, N sparse layers, H heads,
W = D/H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from extract.export.static_layers import StaticBackbone, StaticShapes
from pangu_sigma.model.layers.native_attention import MASKED_SCORE


class Prefill(nn.Cell):
    """input_ids int32 [B, S], valid_length int32 [B] (, domain int32 [B]) -> logits [B, S, V], keys, values
    [L, B, H, S, W], documents int32 [B, S], next int32 [B, 2].

    Tokens from `valid_length` on are padding. `documents` numbers each place's document from 1, 0 for padding; `next`
    is document and position of the token that follows.
    """

    def __init__(self, shapes: StaticShapes) -> None:
        super().__init__()
        self.shapes = shapes
        self.backbone = StaticBackbone(shapes, window=True, given_ids=False)
        self.window_positions = Tensor(np.arange(shapes.window, dtype=np.int32)[None])
        self.causal = Tensor(np.tril(np.ones((1, shapes.window, shapes.window), np.float32)))

    def construct(self, input_ids: Tensor, valid_length: Tensor, domain=None):
        batch, length = self.shapes.batch, self.shapes.window
        real = ops.cast(self.window_positions < valid_length.reshape(batch, 1), ms.float32)
        ended = ops.cast(ops.equal(input_ids, self.shapes.eod_id), ms.float32) * real
        following = ops.CumSum()(ended, 1) + 1.0
        documents = (following - ended) * real
        same = ops.cast(ops.equal(documents.reshape(batch, length, 1), documents.reshape(batch, 1, length)), ms.float32)
        visible = same * self.causal
        # A token sees exactly the tokens of its document up to itself.
        positions = ops.cast(ops.ReduceSum()(visible, 2) - 1.0, ms.int32)
        positions = positions * ops.cast(real, ms.int32)
        mask = ((visible - 1.0) * (-MASKED_SCORE)).reshape(batch, 1, length, length)
        of_tokens = None
        if domain is not None:
            of_tokens = ops.BroadcastTo((batch, length))(domain.reshape(batch, 1)).reshape(-1)
        elif self.shapes.model.sparse_prefixes:
            of_tokens = ops.zeros_like(input_ids.reshape(-1))
        h, keys, values = self.backbone(
            input_ids.reshape(-1), positions.reshape(-1), mask, of_tokens, None, None, None, None
        )
        last = ops.cast(ops.equal(self.window_positions + 1, valid_length.reshape(batch, 1)), ms.float32)
        mark = ops.ReduceSum()(following * last, 1)
        position = ops.ReduceSum()((ops.cast(positions, ms.float32) + 1.0) * (1.0 - ended) * last, 1)
        state = ops.cast(ops.stack((mark, position), 1), ms.int32)
        return self.backbone.logits(h, domain), keys, values, ops.cast(documents, ms.int32), state


class Decode(nn.Cell):
    """input_ids int32 [B, 1], current_index int32 [B], keys, values [L, B, H, S, W], documents [B, S], next [B, 2]
    (, domain int32 [B]) -> logits [B, 1, V] and the four as they are after the token.

    `current_index` is the token's place in its text: where its key and value are written.
    """

    def __init__(self, shapes: StaticShapes) -> None:
        super().__init__()
        self.shapes = shapes
        self.backbone = StaticBackbone(shapes, window=False, given_ids=False)
        self.window_positions = Tensor(np.arange(shapes.window, dtype=np.int32)[None])

    def construct(self, input_ids, current_index, keys, values, documents, next, domain=None):  # noqa: A002
        batch, length = self.shapes.batch, self.shapes.window
        is_current = ops.equal(self.window_positions, current_index.reshape(batch, 1))
        document, position = next[:, 0], next[:, 1]
        documents = ops.select(is_current, ops.BroadcastTo((batch, length))(document.reshape(batch, 1)), documents)
        visible = ops.equal(documents, document.reshape(batch, 1))
        visible = ops.logical_and(visible, ops.less_equal(self.window_positions, current_index.reshape(batch, 1)))
        mask = ((ops.cast(visible, ms.float32) - 1.0) * (-MASKED_SCORE)).reshape(batch, 1, 1, length)
        tokens = input_ids.reshape(-1)
        of_tokens = ops.zeros_like(tokens) if domain is None else domain
        h, keys, values = self.backbone(
            tokens, position, mask, of_tokens, spread(is_current, self.shapes), keys, values, None
        )
        ended = ops.cast(ops.equal(tokens, self.shapes.eod_id), ms.int32)
        following = ops.stack((document + ended, (position + 1) * (1 - ended)), 1)
        return self.backbone.logits(h, domain), keys, values, documents, following


def spread(is_current: Tensor, shapes: StaticShapes) -> Tensor:
    """[B, S] -> the full shape of a layer's cache, [B, H, S, W]."""
    return ops.BroadcastTo(shapes.cache[1:])(is_current.reshape(shapes.batch, 1, shapes.window, 1))


class Caches(nn.Cell):
    """Keys and values of all layers [L, B, H, S, W] as parameters of a graph, 0 at first."""

    def __init__(self, shapes: StaticShapes) -> None:
        super().__init__()
        zeros = np.zeros(shapes.cache, np.float32)
        self.keys = Parameter(Tensor(zeros), name="keys", requires_grad=False)
        self.values = Parameter(Tensor(zeros), name="values", requires_grad=False)
        self.assign = ops.Assign()

    def write(self, result: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`result`, with the writing of both as a condition of it."""
        result = ops.depend(result, self.assign(self.keys, keys))
        return ops.depend(result, self.assign(self.values, values))


class Sigma(nn.Cell):
    """The deployed signature, over a `window` or for one token: input_ids int32 [B, n], expert_ids int32 [N, B, n]
    (absent without sparse layers), attention_mask float32 [B, n, S] (1: visible), position_ids int32 [B, n],
    current_index and batch_valid_length (tokens with the current one) int32 [B] -> logits [B, V] after the token at
    `current_index`. A window writes the whole caches anew, a token its own keys and values.
    """

    def __init__(self, shapes: StaticShapes, window: bool) -> None:
        super().__init__()
        self.shapes, self.is_window = shapes, window
        self.backbone = StaticBackbone(shapes, window, given_ids=True)
        self.caches = Caches(shapes)
        self.window_positions = Tensor(np.arange(shapes.window, dtype=np.int32)[None])

    def run(self, input_ids, expert_ids, attention_mask, position_ids, current_index, batch_valid_length):
        batch, length = self.shapes.batch, self.shapes.window
        known = ops.cast(self.window_positions < batch_valid_length.reshape(batch, 1), ms.float32)
        mask = (attention_mask * known.reshape(batch, 1, length) - 1.0) * (-MASKED_SCORE)
        mask = mask.reshape(batch, 1, -1, length)
        is_current, keys, values = None, None, None
        if not self.is_window:
            is_current = spread(ops.equal(self.window_positions, current_index.reshape(batch, 1)), self.shapes)
            keys, values = self.caches.keys, self.caches.values
        h, keys, values = self.backbone(
            input_ids.reshape(-1), position_ids.reshape(-1), mask, None, is_current, keys, values, expert_ids
        )
        if self.is_window:
            first = Tensor(np.arange(batch, dtype=np.int32) * length)
            h = ops.Gather()(h, current_index + first, 0)
        return self.caches.write(self.backbone.logits(h, None).reshape(batch, -1), keys, values)


class SigmaSparse(Sigma):
    """Six inputs."""

    def construct(self, input_ids, expert_ids, attention_mask, position_ids, current_index, batch_valid_length):
        return self.run(input_ids, expert_ids, attention_mask, position_ids, current_index, batch_valid_length)


class SigmaDense(Sigma):
    """Five inputs."""

    def construct(self, input_ids, attention_mask, position_ids, current_index, batch_valid_length):
        return self.run(input_ids, None, attention_mask, position_ids, current_index, batch_valid_length)


def fill(graph: nn.Cell, tensors: Mapping[str, Callable[[], np.ndarray]]) -> None:
    """Give every parameter of `graph` but its caches its numbers, one at a time; ValueError for one without, or for
    numbers that no parameter takes."""
    parameters = {p.name.removeprefix("backbone."): p for p in graph.get_parameters() if p.name not in STATE}
    if different := parameters.keys() ^ tensors.keys():
        raise ValueError(f"parameters and tensors differ: {', '.join(sorted(different))}")
    for name, parameter in parameters.items():
        array = tensors[name]()
        if tuple(array.shape) != tuple(parameter.shape):
            raise ValueError(f"{name} is {array.shape}, not {parameter.shape}")
        parameter.set_data(Tensor(array))


# Cells that do not show in the names of parameters in a MINDIR.
CELLS_OUTSIDE_NAMES = ("embedding.words.", "embedding.positions.", "embedding.queries.")

# Parameters that are state and no weights, by their names in a MINDIR.
STATE = ("caches.keys", "caches.values")

# What graphs.json says of every input and output.
MEANINGS = {
    "input_ids": "token ids; in prefill, what stands behind the text is ignored",
    "valid_length": "tokens of each sample's text",
    "domain": "number of each sample's domain in the list of domains",
    "current_index": "place of the text's last token, from 0: whose next token the logits are, or where it is written",
    "keys": "the cache of keys: hand back what the last call gave",
    "values": "the cache of values: hand back what the last call gave",
    "documents": "the document of every place, from 1; 0 is not filled",
    "next": "document and position of the token to come",
    "expert_ids": "expert of every token in each sparse layer: expert_ids.npy[layer, domain of the sample, token id]",
    "attention_mask": "1 where a token (row) sees another one (column): itself and earlier ones of its own document",
    "position_ids": "position of every token in its document, from 0",
    "batch_valid_length": "tokens of each sample's text, with the current one",
    "caches.keys": "the cache of keys, a parameter: prefill writes it anew, decode adds its token's",
    "caches.values": "the cache of values, likewise",
    "logits": "of the token that follows: after every place, or (sigma) after current_index",
}


@dataclass(frozen=True)
class ExportedGraph:
    """A graph to export: its cell, its inputs by name with their shapes, the names of its outputs and of its
    parameters that are state."""

    cell: nn.Cell
    inputs: dict[str, Tensor]
    outputs: list[str]
    state: tuple[str, ...] = ()


def build_graph(shapes: StaticShapes, signature: str, name: str) -> ExportedGraph:
    """The graph `prefill` or `decode` of a signature, `plain` or `sigma`; weights are zero."""
    graph = (_plain if signature == "plain" else _sigma)(shapes, name)
    graph.cell.set_train(False)
    for path, parameter in graph.cell.parameters_and_names():
        for cells in CELLS_OUTSIDE_NAMES:
            path = path.replace(cells, "")
        parameter.name = path
    return graph


def _plain(shapes: StaticShapes, name: str) -> ExportedGraph:
    batch, window = shapes.batch, shapes.window
    domain = {"domain": _int_input(batch)} if shapes.domains > 1 else {}
    caches = {"keys": _float_input(*shapes.cache), "values": _float_input(*shapes.cache)}
    state = {"documents": _int_input(batch, window), "next": _int_input(batch, 2)}
    outputs = ["logits", *caches, *state]
    if name == "prefill":
        inputs = {"input_ids": _int_input(batch, window), "valid_length": _int_input(batch), **domain}
        return ExportedGraph(Prefill(shapes), inputs, outputs)
    inputs = {"input_ids": _int_input(batch, 1), "current_index": _int_input(batch), **caches, **state, **domain}
    return ExportedGraph(Decode(shapes), inputs, outputs)


def _sigma(shapes: StaticShapes, name: str) -> ExportedGraph:
    batch, length = shapes.batch, shapes.window if name == "prefill" else 1
    inputs = {"input_ids": _int_input(batch, length)}
    sparse = len(shapes.model.sparse_prefixes)
    if sparse:
        inputs["expert_ids"] = _int_input(sparse, batch, length)
    inputs |= {"attention_mask": _float_input(batch, length, shapes.window), "position_ids": _int_input(batch, length)}
    inputs |= {"current_index": _int_input(batch), "batch_valid_length": _int_input(batch)}
    cell = (SigmaSparse if sparse else SigmaDense)(shapes, window=name == "prefill")
    return ExportedGraph(cell, inputs, ["logits"], STATE)


def _int_input(*size: int) -> Tensor:
    return Tensor(np.zeros(size, np.int32))


def _float_input(*size: int) -> Tensor:
    return Tensor(np.zeros(size, np.float32))
