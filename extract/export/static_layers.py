"""The model's layers as fixed MindSpore graphs that hold their experts, over a window or over one token after it.

Every shape is static, which is what converters for devices take. Training's dispatch has as many rows as each expert
was given; here routing is written without such shapes: over a window either every expert computes every row and a mask
picks (exact), or rows travel through a one-hot tensor of a fixed capacity, as in the deployed graph of PanGu-Σ (one-hot
-> cumulative sum -> less than the capacity -> one-hot; combine weight 1); single tokens gather their experts' weights.

Legend: B samples, S positions of the window, T rows (B*S or B), D hidden width, H heads, W = D/H, F inner width,
V vocabulary, L layers, N sparse layers, E experts of a layer, C capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from pangu_sigma.model.layers.linear_and_norm import NORMS, LinearCell
from parallel.operator_layout import Layout
from parallel.ops.primitives import activation

MASKED_SCORE = -10000.0


@dataclass(frozen=True)
class StaticShapes:
    """Everything that the graphs' shapes follow from. `capacity`: rows an expert takes of a sample's window where ids
    come from outside; as large as the window, nothing is dropped."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    positions: int
    vocab: int
    window: int
    batch: int
    eod_id: int
    query_layer: bool
    sparse: tuple[str, ...]
    learned: bool
    experts: tuple[int, ...]
    per_domain_words: bool
    activation: str
    norm: str
    epsilon: float
    capacity: int

    @property
    def domains(self) -> int:
        """Number of domains; with more than one, plain graphs take each sample's as an input."""
        return len(self.experts)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Layers from bottom to top by name."""
        blocks = tuple(f"blocks.{i}" for i in range(self.layers - int(self.query_layer)))
        return (*blocks, "query_layer") if self.query_layer else blocks

    @property
    def cache(self) -> tuple[int, int, int, int, int]:
        """Shape of the keys of all layers, and of the values: [L, B, H, S, W]."""
        return (self.layers, self.batch, self.heads, self.window, self.hidden // self.heads)


class ExpertBank(nn.Cell):
    """All experts of a sparse layer as parameters. x_TD, expert ids int32 [T] -> y_TD, in one of three static forms."""

    def __init__(self, shapes: StaticShapes, layout: Layout) -> None:
        super().__init__()
        self.count, self.batch, self.capacity = sum(shapes.experts), shapes.batch, shapes.capacity
        sizes = {
            "up_weight": (shapes.hidden, shapes.ffn),
            "up_bias": (shapes.ffn,),
            "down_weight": (shapes.ffn, shapes.hidden),
            "down_bias": (shapes.hidden,),
        }
        for name, size in sizes.items():
            setattr(self, name, Parameter(Tensor(np.zeros((self.count, *size), np.float32)), name=name))
        self.activation = activation(shapes.activation, layout)
        self.product = ops.BatchMatMul()
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def hits(self, ids: Tensor) -> Tensor:
        return self.one_hot(ids, self.count, self.on, self.off)

    def feed_forward(self, rows: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        """rows [G, n, D], weights [G, …] -> [G, n, D]."""
        groups = rows.shape[0]
        inner = self.activation(self.product(rows, up) + up_bias.reshape(groups, 1, -1))[0]
        return self.product(inner, down) + down_bias.reshape(groups, 1, -1)

    def by_gathering(self, x: Tensor, ids: Tensor) -> Tensor:
        """For few rows: each row's own expert, T copies of weights."""
        take = ops.Gather()
        weights = (take(self.up_weight, ids, 0), take(self.up_bias, ids, 0))
        weights = (*weights, take(self.down_weight, ids, 0), take(self.down_bias, ids, 0))
        return self.feed_forward(x.reshape(x.shape[0], 1, -1), *weights).reshape(x.shape)

    def by_masking(self, x: Tensor, ids: Tensor) -> Tensor:
        """Every expert computes every row; E times the arithmetic and nothing dropped."""
        rows = ops.BroadcastTo((self.count, *x.shape))(x.reshape(1, *x.shape))
        y = self.feed_forward(rows, self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        # A sum with zeros is exact, so the expert's own number comes out.
        mask = self.hits(ids).transpose(1, 0).reshape(self.count, x.shape[0], 1)
        return ops.ReduceSum()(y * mask, 0)

    def by_capacity(self, x: Tensor, ids: Tensor) -> Tensor:
        """The deployed graph's form: an expert takes `capacity` rows of a sample in token order, the others get 0."""
        capacity, length, hidden = self.capacity, x.shape[0] // self.batch, x.shape[1]
        hits = self.hits(ids.reshape(self.batch, length))
        # Place of a row among its expert's, counted from 1; 0 for every other expert.
        rank = ops.CumSum()(hits, 1) * hits
        kept = ops.cast(ops.less_equal(rank, float(capacity)), ms.float32) * hits
        capacity_slot = ops.cast(ops.ReduceSum()(rank * kept, 2), ms.int32) - 1
        slots = self.one_hot(capacity_slot, capacity, self.on, self.off)
        route = kept.reshape(self.batch, length, self.count, 1) * slots.reshape(self.batch, length, 1, capacity)
        route = route.reshape(self.batch, length, self.count * capacity)
        sent = ops.BatchMatMul(transpose_a=True)(route, x.reshape(self.batch, length, hidden))
        rows = sent.reshape(self.batch, self.count, capacity, hidden).transpose(1, 0, 2, 3)
        rows = rows.reshape(self.count, self.batch * capacity, hidden)
        y = self.feed_forward(rows, self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        y = y.reshape(self.count, self.batch, capacity, hidden).transpose(1, 0, 2, 3)
        return self.product(route, y.reshape(self.batch, self.count * capacity, hidden)).reshape(x.shape)


class StaticSparseLayer(nn.Cell):
    """A sparse layer's feed-forward part: expert ids from outside, from its table, or from its gate."""

    def __init__(self, shapes: StaticShapes, layout: Layout, window: bool, given_ids: bool) -> None:
        super().__init__()
        self.experts = ExpertBank(shapes, layout)
        self.learned, self.given_ids = shapes.learned, given_ids
        self.vocab, self.window = shapes.vocab, window
        # Copying the weights of T experts costs less than computing T rows with each of E.
        self.few = not window and shapes.batch <= sum(shapes.experts)
        if self.learned:
            gate = np.zeros((shapes.hidden, sum(shapes.experts)), np.float32)
            self.router = Parameter(Tensor(gate), name="router")
        elif not given_ids:
            table = np.zeros((shapes.domains, shapes.vocab), np.int32)
            self.routing = Parameter(Tensor(table), name="routing", requires_grad=False)

    def construct(self, x: Tensor, tokens: Tensor, domain, given) -> Tensor:
        """x_TD, tokens and domain int32 [T], expert ids [T] if they come from outside -> y_TD."""
        if self.learned:
            probabilities = ops.Softmax(-1)(ops.MatMul()(x, self.router))
            ids, weight = ops.ArgMaxWithValue(axis=-1)(probabilities)
            y = self.computed(x, ops.cast(ids, ms.int32))
            return y * weight.reshape(-1, 1)
        if given is not None:
            return self.computed(x, given)
        return self.computed(x, ops.Gather()(self.routing.reshape(-1), domain * self.vocab + tokens, 0))

    def computed(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.few:
            return self.experts.by_gathering(x, ids)
        if self.given_ids and self.window:
            return self.experts.by_capacity(x, ids)
        return self.experts.by_masking(x, ids)


class StaticDenseLayer(nn.Cell):
    """A dense layer's feed-forward part."""

    def __init__(self, shapes: StaticShapes, layout: Layout) -> None:
        super().__init__()
        self.up = LinearCell(shapes.hidden, shapes.ffn, layout, ms.float32, 0.0)
        self.down = LinearCell(shapes.ffn, shapes.hidden, layout, ms.float32, 0.0)
        self.activation = activation(shapes.activation, layout)

    def construct(self, x: Tensor, tokens: Tensor, domain, given) -> Tensor:
        return self.down(self.activation(self.up(x))[0])


class StaticCachedAttention(nn.Cell):
    """queries, x [T, D] -> (y_TD, keys, values [B, H, S, W] with the new rows in their places)."""

    def __init__(self, shapes: StaticShapes, layout: Layout) -> None:
        super().__init__()
        self.batch, self.heads, self.width = shapes.batch, shapes.heads, shapes.hidden // shapes.heads
        for part in ("query", "key", "value", "projection"):
            setattr(self, part, LinearCell(shapes.hidden, shapes.hidden, layout, ms.float32, 0.0))
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.product = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)
        self.scale = 1.0 / math.sqrt(self.width)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(self.batch, -1, self.heads, self.width).transpose(0, 2, 1, 3)

    def construct(self, queries: Tensor, x: Tensor, mask: Tensor, is_current, keys, values):
        """mask [B, 1, n, S] is added to scores; with caches `is_current` [B, H, S, W] marks the new row's place."""
        q = self.split(self.query(queries) * self.scale)
        k, v = self.split(self.key(x)), self.split(self.value(x))
        if is_current is not None:
            broadcast = ops.BroadcastTo(keys.shape)
            k, v = ops.select(is_current, broadcast(k), keys), ops.select(is_current, broadcast(v), values)
        p = self.softmax(self.scores(q, k) + mask)
        y = self.product(p, v).transpose(0, 2, 1, 3).reshape(x.shape)
        return self.projection(y), k, v


class StaticLayer(nn.Cell):
    """A transformer layer with its caches."""

    def __init__(self, shapes: StaticShapes, layout: Layout, sparse: bool, window: bool, given_ids: bool) -> None:
        super().__init__()
        self.norm1 = NORMS[shapes.norm](shapes.hidden, shapes.epsilon, layout)
        self.attention = StaticCachedAttention(shapes, layout)
        self.norm2 = NORMS[shapes.norm](shapes.hidden, shapes.epsilon, layout)
        self.feed_forward = (
            StaticSparseLayer(shapes, layout, window, given_ids) if sparse else StaticDenseLayer(shapes, layout)
        )

    def construct(self, h: Tensor, queries, mask: Tensor, is_current, keys, values, tokens: Tensor, domain, given):
        x = self.norm1(h)
        y, k, v = self.attention(x if queries is None else queries, x, mask, is_current, keys, values)
        h = h + y
        return h + self.feed_forward(self.norm2(h), tokens, domain, given), k, v


class StaticBackbone(nn.Cell):
    """Everything between token ids and hidden rows, `window` rows per sample or one. The domains' experts, tables and
    word embeddings lie one after the other in their parameters."""

    def __init__(self, shapes: StaticShapes, window: bool, given_ids: bool) -> None:
        super().__init__()
        layout = Layout()
        self.shapes, self.window = shapes, window
        slots = shapes.domains if shapes.per_domain_words else 1

        def table(name: str, rows: int) -> Parameter:
            return Parameter(Tensor(np.zeros((rows, shapes.hidden), np.float32)), name=name)

        self.word = table("word", slots * shapes.vocab)
        self.position = table("position", shapes.positions)
        self.sparse_index_of = tuple(
            shapes.sparse.index(prefix) if prefix in shapes.sparse else -1 for prefix in shapes.prefixes
        )
        layers = [StaticLayer(shapes, layout, index >= 0, window, given_ids) for index in self.sparse_index_of]
        self.blocks = nn.CellList(layers[:-1] if shapes.query_layer else layers)
        self.norm = NORMS[shapes.norm](shapes.hidden, shapes.epsilon, layout)
        if shapes.query_layer:
            self.query = table("query", shapes.positions)
            self.query_layer = layers[-1]
        self.take = ops.Gather()

    def construct(self, tokens: Tensor, positions: Tensor, mask: Tensor, domain, is_current, keys, values, expert_ids):
        """tokens, positions, domain [T], mask [B, 1, n, S]; -> (h_TD, keys, values as lists of L tensors)."""
        words = tokens
        if self.shapes.per_domain_words and self.shapes.domains > 1:
            words = tokens + domain * self.shapes.vocab
        h = self.take(self.word, words, 0) + self.take(self.position, positions, 0)
        new_keys, new_values = (), ()
        for i, block in enumerate(self.blocks):
            k_old, v_old = (None, None) if is_current is None else (keys[i], values[i])
            h, k, v = block(h, None, mask, is_current, k_old, v_old, tokens, domain, self.of_layer(expert_ids, i))
            new_keys, new_values = (*new_keys, k), (*new_values, v)
        h = self.norm(h)
        if self.shapes.query_layer:
            i = self.shapes.layers - 1
            k_old, v_old = (None, None) if is_current is None else (keys[i], values[i])
            queries = self.take(self.query, positions, 0)
            given = self.of_layer(expert_ids, i)
            h, k, v = self.query_layer(h, queries, mask, is_current, k_old, v_old, tokens, domain, given)
            new_keys, new_values = (*new_keys, k), (*new_values, v)
        return h, ops.stack(new_keys), ops.stack(new_values)

    def of_layer(self, expert_ids, layer: int):
        if expert_ids is None or self.sparse_index_of[layer] < 0:
            return None
        return expert_ids[self.sparse_index_of[layer]].reshape(-1)

    def logits(self, h: Tensor, domain) -> Tensor:
        """h [B * n, D] -> [B, n, V] by the word table of each sample (`domain` [B])."""
        batch, hidden = self.shapes.batch, self.shapes.hidden
        if not self.shapes.per_domain_words or self.shapes.domains == 1:
            return ops.MatMul(transpose_b=True)(h, self.word).reshape(batch, -1, self.shapes.vocab)
        tables = self.take(self.word.reshape(self.shapes.domains, -1, hidden), domain, 0)
        return ops.BatchMatMul(transpose_b=True)(h.reshape(batch, -1, hidden), tables)
