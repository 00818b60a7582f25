"""The network as a fixed MindSpore graph that holds its experts, over a window or over one token after it:
`pangu_sigma.model.backbone` with an attention core and sparse layers of static shapes.

Every shape is static, which is what converters for devices take. Training's dispatch has as many rows as each expert
was given; here routing is written without such shapes: over a window either every expert computes every row and a mask
picks (exact), or rows travel through a one-hot tensor of a fixed capacity, as in the deployed graph of PanGu-Σ (one-hot
-> cumulative sum -> less than the capacity -> one-hot; combine weight 1); single tokens gather their experts' weights.

Legend: B samples, S positions of the window, T rows (B*S or B), D hidden width, H heads, W = D/H, F inner width,
V vocabulary, L layers, E experts of a layer, C capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.backbone import Backbone, output_head, transformer_layers
from parallel.operator_layout import Layout
from parallel.ops.primitives import activation


@dataclass(frozen=True)
class StaticShapes:
    """Everything that the graphs' shapes follow from. `capacity`: rows an expert takes of a sample's window where ids
    come from outside; as large as the window, nothing is dropped."""

    model: ModelConfig
    vocab: int
    window: int
    batch: int
    eod_id: int
    experts: tuple[int, ...]
    capacity: int

    @property
    def domains(self) -> int:
        """Number of domains; with more than one, plain graphs take each sample's as an input."""
        return len(self.experts)

    @property
    def cache(self) -> tuple[int, int, int, int, int]:
        """Shape of the keys of all layers, and of the values: [L, B, H, S, W]."""
        model = self.model
        return (model.layers, self.batch, model.heads, self.window, model.hidden // model.heads)



class ExpertBank(nn.Cell):
    """All experts of a sparse layer as parameters. x_TD, expert ids int32 [T] -> y_TD, in one of three static forms."""

    def __init__(self, shapes: StaticShapes, layout: Layout) -> None:
        super().__init__()
        self.count, self.batch, self.capacity = sum(shapes.experts), shapes.batch, shapes.capacity
        network = shapes.model.expert_network
        for tensor, size in network.shapes(shapes.model.hidden, shapes.model.ffn).items():
            name = tensor.replace(".", "_")
            setattr(self, name, Parameter(Tensor(np.zeros((self.count, *size), np.float32)), name=name))
        self.activation = activation(network.activation, layout)
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
    """A sparse layer's feed-forward part: expert ids from outside, from its table, or from its gate.

    x_TD, routing (tokens and domain int32 [T], expert ids [T] if they come from outside), no weights -> (y_TD, None,
    None).
    """

    def __init__(self, shapes: StaticShapes, layout: Layout, window: bool, given_ids: bool) -> None:
        super().__init__()
        self.experts = ExpertBank(shapes, layout)
        self.learned, self.given_ids = shapes.model.router_spec.learned, given_ids
        self.vocab, self.window = shapes.vocab, window
        # Copying the weights of T experts costs less than computing T rows with each of E.
        self.few = not window and shapes.batch <= sum(shapes.experts)
        if self.learned:
            gate = np.zeros((shapes.model.hidden, sum(shapes.experts)), np.float32)
            self.router = Parameter(Tensor(gate), name="router")
        elif not given_ids:
            table = np.zeros((shapes.domains, shapes.vocab), np.int32)
            self.routing = Parameter(Tensor(table), name="routing", requires_grad=False)

    def construct(self, x: Tensor, routing: tuple, weights: tuple):
        tokens, domain, ids = routing
        if self.learned:
            probabilities = ops.Softmax(-1)(ops.MatMul()(x, self.router))
            ids, weight = ops.ArgMaxWithValue(axis=-1)(probabilities)
            return self.computed(x, ops.cast(ids, ms.int32)) * weight.reshape(-1, 1), None, None
        if ids is None:
            ids = ops.Gather()(self.routing.reshape(-1), domain * self.vocab + tokens, 0)
        return self.computed(x, ids), None, None

    def computed(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.few:
            return self.experts.by_gathering(x, ids)
        if self.given_ids and self.window:
            return self.experts.by_capacity(x, ids)
        return self.experts.by_masking(x, ids)


class StaticAttention(nn.Cell):
    """Attention core (see `Attention`): q, k, v [T, D] -> (y_TD, (keys, values) [B, H, S, W] with the new rows).

    `context`: mask [B, 1, n, S], added to scores; then, with caches, `is_current` [B, H, S, W], which marks the new
    row's place, and the cached keys and values; else None three times.
    """

    def __init__(self, shapes: StaticShapes) -> None:
        super().__init__()
        _, self.batch, self.heads, _, self.width = shapes.cache
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.product = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)
        self.scale = 1.0 / math.sqrt(self.width)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(self.batch, -1, self.heads, self.width).transpose(0, 2, 1, 3)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, context: tuple, keys: Tensor):
        mask, is_current, cached_keys, cached_values = context
        q_BHnW, k_BHSW, v_BHSW = self.split(q * self.scale), self.split(k), self.split(v)
        if is_current is not None:
            broadcast = ops.BroadcastTo(cached_keys.shape)
            k_BHSW = ops.select(is_current, broadcast(k_BHSW), cached_keys)
            v_BHSW = ops.select(is_current, broadcast(v_BHSW), cached_values)
        p = self.softmax(self.scores(q_BHnW, k_BHSW) + mask)
        return self.product(p, v_BHSW).transpose(0, 2, 1, 3).reshape(q.shape), (k_BHSW, v_BHSW)


class StaticBackbone(Backbone):
    """Token ids to logits, `window` rows per sample or one. The domains' experts, tables and word embeddings lie one
    after the other in their parameters."""

    def __init__(self, shapes: StaticShapes, window: bool, given_ids: bool) -> None:
        layout, model = Layout(), shapes.model
        # Their values come from files.
        with no_init_parameters():
            sparse = [StaticSparseLayer(shapes, layout, window, given_ids) for _ in model.sparse_prefixes]
            cores = [StaticAttention(shapes) for _ in range(model.layers)]
            layers = transformer_layers(model, layout, ms.float32, sparse, cores)
            super().__init__(model, shapes.vocab, layout, layers, output_head(model, shapes.vocab, layout, 0))
        self.batch, self.table_shape = shapes.batch, (shapes.domains, shapes.vocab, model.hidden)
        if self.embedding.words.per_domain:
            tables = np.zeros((shapes.domains * shapes.vocab, model.hidden), np.float32)
            self.word = Parameter(Tensor(tables), name="word")
        self.no_dropout = Tensor([0], ms.int32)

    def construct(self, tokens: Tensor, positions: Tensor, mask: Tensor, domain, is_current, keys, values, expert_ids):
        """tokens, positions, domain [T], mask [B, 1, n, S]; -> (h_TD, keys, values [L, B, H, S, W])."""
        caches, sparse_inputs = (), ()
        for i in range(self.layers):
            caches = (*caches, *((None, None) if is_current is None else (keys[i], values[i])))
            index = self.sparse_index_of[i]
            if index >= 0:
                ids = None if expert_ids is None else expert_ids[index].reshape(-1)
                sparse_inputs = (*sparse_inputs, ((tokens, domain, ids), ()))
        h = self.embedding(tokens.reshape(-1, 1), positions, domain, self.word_table())
        h, kept, _, _ = self.through_layers(h, positions, (mask, is_current), caches, self.no_dropout, sparse_inputs)
        return h, ops.stack(kept[0::2]), ops.stack(kept[1::2])

    def word_table(self) -> Tensor:
        """The word table [V, D], or the domains' [domains, V, D] where there are several."""
        words = self.embedding.words
        return self.word.reshape(self.table_shape) if words.per_domain else words.word

    def logits(self, h: Tensor, domain) -> Tensor:
        """h [B * n, D] -> [B, n, V] by the word table of each sample (`domain` [B])."""
        return self.head.logits(h, self.batch, domain, self.word_table())
