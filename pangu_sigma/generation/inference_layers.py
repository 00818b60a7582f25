"""Inference layers on the parameters of the training network: no copies, so an optimizer step shows at once.

They compute what the cells of `pangu_sigma.model` and `rre` compute, without gradients and for few rows, where other
forms are fast on CPU: there a native LayerNorm is one operator instead of eight, and a vector by a matrix runs at
the speed at which memory gives the matrix. So every row of a decoding step goes through its own expert alone, on
weights that are not copied; what a row computes there depends on nothing else in the batch.

Legend: T rows, D hidden width, H heads, W = D/H head width, N expert slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import CompiledCombine, CompiledFeedForward
from parallel.ops.primitives import activation, rms_norm
from parallel.ops.rotary import rotary
from rre.dispatch.dispatch_plan import build_plan_cell
from rre.dispatch.expert_dispatch import TokenCombine, TokenDispatch
from rre.experts import Experts
from rre.feed_forward_spec import FeedForwardSpec
from rre.routers.learned_gate import Gate

NamedParameters = Mapping[str, Parameter]


class InferenceCell(nn.Cell):
    """Base of inference cells: does not rename the parameters that it shares with the network."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)


class InferenceLinear(InferenceCell):
    """Linear layer: x [T, in] @ w [in, out] + b [out], with the network's weight of this name and its bias, if it has
    one; the product in `compute` precision, else float32."""

    def __init__(self, named: NamedParameters, name: str, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        self.weight = named[f"{name}.weight"]
        self.has_bias = f"{name}.bias" in named
        if self.has_bias:
            self.bias = named[f"{name}.bias"]
        self.low = compute != ms.float32
        self.compute = compute
        self.multiply = layout(ops.MatMul(), (1, 1), (1, 1))
        self.add_bias = layout(ops.BiasAdd(), (1, 1), (1,))
        self.cast = layout(ops.Cast(), (1, 1))

    def construct(self, x: Tensor) -> Tensor:
        if self.low:
            y = self.cast(self.multiply(self.cast(x, self.compute), self.cast(self.weight, self.compute)), ms.float32)
        else:
            y = self.multiply(x, self.weight)
        return self.add_bias(y, self.bias) if self.has_bias else y


class InferenceLayerNorm(InferenceCell):
    """Layer normalisation of x_TD with the network's gamma and beta of this name."""

    def __init__(self, named: NamedParameters, name: str, model: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.gamma, self.beta = named[f"{name}.gamma"], named[f"{name}.beta"]
        self.norm = layout(ops.LayerNorm(1, 1, model.norm_epsilon), (1, 1), (1,), (1,))

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.gamma, self.beta)[0]


class InferenceRmsNorm(InferenceCell):
    """RMS normalisation of x_TD with the network's gamma of this name."""

    def __init__(self, named: NamedParameters, name: str, model: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.gamma = named[f"{name}.gamma"]
        self.norm = rms_norm(layout, model.norm_epsilon)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.gamma)[0]


def inference_norm(named: NamedParameters, name: str, model: ModelConfig, layout: Layout) -> InferenceCell:
    """The normalisation of the configuration, with the network's parameters of this name."""
    kind = {"layernorm": InferenceLayerNorm, "rmsnorm": InferenceRmsNorm}[model.norm]
    return kind(named, name, model, layout)


class InferenceFeedForward(InferenceCell):
    """Feed-forward network: x_TD and its tensors -> y_TD (see `FeedForwardSpec`); the products in `compute` precision.

    Written out instead of made of cells: MindSpore visits every cell of a graph in Python at every call.
    """

    def __init__(self, form: FeedForwardSpec, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        self.form = form
        self.low = compute != ms.float32
        self.compute = compute
        self.multiply = layout(ops.MatMul(), (1, 1), (1, 1))
        self.add_bias = layout(ops.BiasAdd(), (1, 1), (1,))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.cast = layout(ops.Cast(), (1, 1))
        self.activation = activation(form.activation, layout)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        """x_TK @ w_KN, float32."""
        if self.low:
            return self.cast(self.multiply(self.cast(x, self.compute), self.cast(w, self.compute)), ms.float32)
        return self.multiply(x, w)

    def construct(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if self.form.gated:
            gated = self.mul(self.activation(self.product(x, weights[0]))[0], self.product(x, weights[1]))
            return self.product(gated, weights[2])
        if self.form.biases:
            inner = self.activation(self.add_bias(self.product(x, weights[0]), weights[1]))[0]
            return self.add_bias(self.product(inner, weights[2]), weights[3])
        return self.product(self.activation(self.product(x, weights[0]))[0], weights[1])


class InferenceDenseFeedForward(InferenceCell):
    """Feed-forward network whose tensors begin with `prefix`, for every row; ignores the inputs of a sparse layer."""

    def __init__(
        self, named: NamedParameters, prefix: str, form: FeedForwardSpec, layout: Layout, compute: ms.dtype
    ) -> None:
        super().__init__()
        self.weights = ParameterTuple(named[f"{prefix}.{name}"] for name in form.tensors)
        self.feed_forward = InferenceFeedForward(form, layout, compute)

    def construct(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.feed_forward(x, self.weights)


class ExpertPerRow(InferenceCell):
    """Experts of a table-routed layer in a decode step: row i goes through the expert whose tensors are the i-th
    inputs.
    """

    def __init__(self, model: ModelConfig, rows: int, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        self.rows = rows
        self.each = len(model.expert_network.tensors)
        self.feed_forward = InferenceFeedForward(model.expert_network, layout, compute)
        self.split = layout(ops.Split(0, rows), (1, 1))
        self.concat = layout(ops.Concat(0))

    def construct(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.rows == 1:
            return self.feed_forward(x, inputs)
        parts = self.split(x)
        results = ()
        for row in range(self.rows):
            results = results + (self.feed_forward(parts[row], inputs[self.each * row : self.each * (row + 1)]),)
        return self.concat(results)


class PlannedExperts(InferenceCell):
    """Experts of a table-routed layer over a prompt: `inputs` are the rows of N slots and of the dropped (none), the
    positions, then the tensors of N networks, as training plans them."""

    def __init__(self, model: ModelConfig, slots: int, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        self.slots = slots
        self.dispatch = TokenDispatch(layout)
        self.experts = Experts(layout, model.expert_network, compute)
        self.combine = TokenCombine(layout)

    def construct(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        rows, position = inputs[: self.slots + 1], inputs[self.slots + 1]
        results = self.experts(self.dispatch(x, rows, position), inputs[self.slots + 2 :])
        return self.combine(results, rows, position, x)


class GatedExperts(InferenceCell):
    """Experts of a layer with a learned gate, the network's own, over all E experts, whose tensors are the inputs.

    It chooses as in evaluation: without noise, and nothing is dropped. Compiled kernels, where they are, compute all
    experts in one operator of static shapes, which compiles in a moment whatever E is.
    """

    def __init__(self, gate: Gate, experts: int, model: ModelConfig, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        self.gate = gate
        self.has_kernels = bool(layout.kernels)
        self.plan = build_plan_cell(experts, layout)
        if self.has_kernels:
            form = model.expert_network
            self.networks = CompiledFeedForward(layout.kernels, form.activation, tensors=len(form.tensors))
            self.weigh = CompiledCombine(layout.kernels)
        self.dispatch = TokenDispatch(layout)
        self.experts = Experts(layout, model.expert_network, compute)
        self.combine = TokenCombine(layout)
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.choice_sum = layout(ops.ReduceSum(), (1, 1, 1))

    def construct(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        y, weights = self.by_choice(x, inputs)
        if self.has_kernels:
            return self.weigh(y, weights)
        y = self.mul(y, weights.reshape(-1, 1))
        tokens, hidden = x.shape
        if y.shape[0] > tokens:
            y = self.choice_sum(y.reshape(tokens, -1, hidden), 1)
        return y

    def by_choice(self, x: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What every chosen expert gives [T * k, D], choices of a token together, and the combine weights [T, k]."""
        chosen = self.gate.choose(x, ())
        plan = self.plan(chosen[0])
        if self.has_kernels:
            return self.networks(x, plan[0], plan[1], inputs)[0], chosen[1]
        rows, position = plan[:-1], plan[-1]
        results = self.experts(self.dispatch(x, rows, position), inputs)
        return self.combine(results, rows, position, x), chosen[1]


class WithSharedExpert(InferenceCell):
    """Routed experts plus the shared expert that every row takes: x, inputs -> the sum of both."""

    def __init__(self, routed: nn.Cell, shared: nn.Cell, layout: Layout) -> None:
        super().__init__()
        self.routed, self.shared = routed, shared
        self.add = layout(ops.Add(), (1, 1), (1, 1))

    def construct(self, x: Tensor, inputs: tuple[Tensor, ...]):
        return self.add(self.routed(x, inputs), self.shared(x, ()))


class InferenceLayer(InferenceCell):
    """Transformer layer around an attention `core`: h_TD -> (h_TD, new keys and values).

    The core is called with this layer's queries (scaled), keys and values [T, D] and `context`, its own business;
    queries and keys are normalised and rotated before, as the configuration says (`cos_sin`: of `RotaryCosSin`). In
    the query layer the queries are made from `query_rows` [T, D] instead of h.
    """

    def __init__(
        self, named: NamedParameters, prefix: str, core: nn.Cell, feed_forward: nn.Cell, model: ModelConfig,
        layout: Layout, compute: ms.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = inference_norm(named, f"{prefix}.norm1", model, layout)
        self.norm2 = inference_norm(named, f"{prefix}.norm2", model, layout)
        self.query = InferenceLinear(named, f"{prefix}.attention.query", layout, compute)
        self.key = InferenceLinear(named, f"{prefix}.attention.key", layout, compute)
        self.value = InferenceLinear(named, f"{prefix}.attention.value", layout, compute)
        self.projection = InferenceLinear(named, f"{prefix}.attention.projection", layout, compute)
        self.normalises = model.attention.qk_norm
        if self.normalises:
            self.query_norm = inference_norm(named, f"{prefix}.attention.query_norm", model, layout)
            self.key_norm = inference_norm(named, f"{prefix}.attention.key_norm", model, layout)
        self.rotates = model.position == "rope"
        if self.rotates:
            self.apply_rotary = rotary(layout, model.heads, model.hidden // model.heads)
        self.core = core
        self.feed_forward = feed_forward
        self.scale = 1.0 / math.sqrt(model.hidden // model.heads)
        self.add = layout(ops.Add(), (1, 1), (1, 1))

    def construct(
        self, h: Tensor, query_rows, cos_sin: tuple, context: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
    ):  # fmt: skip
        h, kept = self.attend(h, query_rows, cos_sin, context)
        return self.add(h, self.feed_forward(self.norm2(h), inputs)), kept

    def attend(self, h: Tensor, query_rows, cos_sin: tuple, context: tuple[Tensor, ...]):
        """(h + the attention part's output, what the core keeps)."""
        x = self.norm1(h)
        q, k = self.query(x if query_rows is None else query_rows), self.key(x)
        if self.normalises:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotates:
            q, k = self.apply_rotary(q, cos_sin), self.apply_rotary(k, cos_sin)
        y, kept = self.core(q * self.scale, k, self.value(x), context)
        return self.add(h, self.projection(y)), kept


class OutputHead(InferenceCell):
    """Output matrix, tied or not: h_TD, rows `last` int32 [n] or None, word tables -> logits float32 [T, V] or [n, V].

    `norm` is the backbone's where no query layer stands between it and the head. Each row is taken under its own table
    where there are several.
    """

    def __init__(self, norm: nn.Cell | None, tables: int, layout: Layout) -> None:
        super().__init__()
        self.has_norm = norm is not None
        if norm is not None:
            self.norm = norm
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.product = layout(ops.MatMul(transpose_b=True), (1, 1), (1, 1))
        self.split_rows = layout(ops.Split(0, max(tables, 1)), (1, 1))
        self.concat = layout(ops.Concat(0))

    def construct(self, h: Tensor, last, tables: tuple[Tensor, ...]) -> Tensor:
        return self.logits(self.select(h, last), tables)

    def select(self, h: Tensor, last) -> Tensor:
        """What the output matrix takes of h [T, D]: all rows, or those of `last`."""
        if self.has_norm:
            h = self.norm(h)
        return h if last is None else self.take(h, last, 0)

    def logits(self, h: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Logits float32 [T, V] of what `select` gave [T, D]."""
        if len(tables) == 1:
            return self.product(h, tables[0])
        parts = self.split_rows(h)
        rows = ()
        for i, table in enumerate(tables):
            rows = rows + (self.product(parts[i], table),)
        return self.concat(rows)
