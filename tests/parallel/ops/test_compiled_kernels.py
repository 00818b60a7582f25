"""The compiled kernels compute what the composed operators compute, to float32 rounding, with any number of threads."""

import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import (
    CompiledApplyRotary,
    CompiledAttention,
    CompiledCombine,
    CompiledCrossEntropy,
    CompiledFeedForward,
    CompiledLayerNorm,
    CompiledLinear,
    CompiledPlan,
    CompiledProduct,
    CompiledRmsNorm,
    CompiledSquareSums,
    HostKernels,
    library,
)
from parallel.ops.primitives import LayerNorm, Linear, Product, RmsNorm, SquareSums, TiedCrossEntropy
from parallel.ops.rotary import ApplyRotary, rotary_angles
from rre.experts import Expert
from rre.feed_forward_spec import FeedForwardSpec

LAYOUT = Layout()
PATH = library()
pytestmark = pytest.mark.skipif(PATH is None, reason="no compiled kernels in this installation")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))


class First(nn.Cell):
    """The first output of a cell, weighted and summed, so that every entry of its gradient is asked for."""

    def __init__(self, cell: nn.Cell, takes_first: bool) -> None:
        super().__init__()
        self.cell = cell
        self.takes_first = takes_first

    def construct(self, slopes, *inputs):
        y = self.cell(*inputs)
        if self.takes_first:
            y = y[0]
        return (y * slopes).sum(), y


def differentiated(cell: nn.Cell, slopes: Tensor, inputs: tuple, num_gradients: int, takes_first: bool = True):
    """The value and the gradients by the first `num_gradients` inputs."""
    step = ops.value_and_grad(First(cell, takes_first).set_train(), tuple(range(1, num_gradients + 1)), has_aux=True)
    (_, y), gradients = step(slopes, *inputs)
    return [a.asnumpy() for a in (y, *gradients)]


def assert_close(results, expected, tolerance: float = 2e-6) -> None:
    for ours, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("tokens, inner, outer", [(1, 5, 3), (300, 70, 600), (513, 300, 64)])
def test_the_affine_map(tokens, inner, outer):
    inputs = normal(tokens, inner), normal(inner, outer), normal(outer)
    slopes = normal(tokens, outer)
    results = differentiated(CompiledLinear(PATH), slopes, inputs, 3, False)
    assert_close(results, differentiated(Linear(LAYOUT), slopes, inputs, 3, False))


def test_the_map_without_a_bias():
    inputs, slopes = (normal(300, 70), normal(70, 600)), normal(300, 600)
    results = differentiated(CompiledProduct(PATH), slopes, inputs, 2, False)
    assert_close(results, differentiated(Product(LAYOUT), slopes, inputs, 2, False))


@pytest.mark.parametrize("tokens, hidden", [(1, 7), (200, 96)])
def test_normalisation_by_the_root_mean_square(tokens, hidden):
    inputs, slopes = (normal(tokens, hidden) * 3 + 1, normal(hidden)), normal(tokens, hidden)
    results = differentiated(CompiledRmsNorm(PATH, 1e-5), slopes, inputs, 2)
    assert_close(results, differentiated(RmsNorm(LAYOUT, 1e-5), slopes, inputs, 2))


class WithCosSin(nn.Cell):
    def __init__(self, cell: nn.Cell, *cos_sin: Tensor) -> None:
        super().__init__()
        self.cell, self.cos_sin = cell, cos_sin

    def construct(self, x):
        return self.cell(x, self.cos_sin)


@pytest.mark.parametrize("tokens, heads, width", [(1, 1, 2), (150, 3, 10), (70, 2, 64)])
def test_the_rotation(tokens, heads, width):
    half = rotary_angles(tokens, width, 100.0)
    full = np.tile(half, (1, 2 * heads))
    inputs, slopes = (normal(tokens, heads * width),), normal(tokens, heads * width)
    compiled = WithCosSin(CompiledApplyRotary(PATH), Tensor(np.cos(half)), Tensor(np.sin(half)))
    composed = WithCosSin(ApplyRotary(LAYOUT, heads, width), Tensor(np.cos(full)), Tensor(np.sin(full)))
    results = []
    for cell in (compiled, composed):
        step = ops.value_and_grad(First(cell, False).set_train(), 1, has_aux=True)
        (_, y), dx = step(slopes, *inputs)
        results.append((y.asnumpy(), dx.asnumpy()))
    assert_close(*results)


@pytest.mark.parametrize("k", [1, 8])
def test_the_weighted_sum_of_choices(k):
    tokens, hidden = 130, 20
    y, weights, slopes = normal(tokens * k, hidden), normal(tokens, k, seed=1), normal(tokens, hidden, seed=2)
    out, dy, dweights = differentiated(CompiledCombine(PATH), slopes, (y, weights), 2, False)
    by_token, w = y.asnumpy().reshape(tokens, k, hidden), weights.asnumpy()
    expected = (
        (by_token * w[:, :, None]).sum(1),
        (w[:, :, None] * slopes.asnumpy()[:, None]).reshape(-1, hidden),
        (by_token * slopes.asnumpy()[:, None]).sum(2),
    )
    assert_close((out, dy, dweights), expected)


@pytest.mark.parametrize("tokens, hidden", [(1, 7), (200, 96)])
def test_layer_normalisation(tokens, hidden):
    inputs, slopes = (normal(tokens, hidden) * 3 + 1, normal(hidden), normal(hidden, seed=1)), normal(tokens, hidden)
    results = differentiated(CompiledLayerNorm(PATH, 1e-5), slopes, inputs, 3)
    assert_close(results, differentiated(LayerNorm(LAYOUT, 1e-5), slopes, inputs, 3))


@pytest.mark.parametrize("tokens, vocab", [(3, 11), (530, 2100)])
def test_cross_entropy(tokens, vocab):
    labels = Tensor(np.random.default_rng(0).integers(0, vocab, tokens).astype(np.int32))
    inputs, slopes = (normal(tokens, 24), normal(vocab, 24) * 0.3, labels), normal(tokens)
    results = differentiated(CompiledCrossEntropy(PATH), slopes, inputs, 2)
    assert_close(results, differentiated(TiedCrossEntropy(LAYOUT), slopes, inputs, 2), 5e-6)


def attended(q, k, v, segments, heads):
    """Attention in float64, query by query."""
    batch, length = segments.shape
    width = q.shape[1] // heads
    y = np.zeros(q.shape)
    for b in range(batch):
        for i in range(length):
            seen = [b * length + j for j in range(i + 1) if segments[b, j] == segments[b, i]]
            for h in range(heads):
                head = slice(h * width, (h + 1) * width)
                scores = k[seen, head] @ q[b * length + i, head] / np.sqrt(width)
                p = np.exp(scores - scores.max())
                y[b * length + i, head] = p / p.sum() @ v[seen, head]
    return y


@pytest.mark.parametrize("batch, length, heads, width", [(2, 7, 2, 3), (1, 129, 1, 8), (2, 300, 2, 16)])
def test_attention_inside_documents(batch, length, heads, width):
    draw = np.random.default_rng(3)
    # Documents of one token, of many, and a boundary inside and at the edge of a block of queries.
    segments = np.sort(draw.integers(0, 4, (batch, length)), 1).astype(np.int32)
    segments[0] = np.arange(length) >= min(128, length // 2)
    shape = (batch * length, heads * width)
    arrays = [draw.standard_normal(shape) for _ in range(3)]
    slopes = draw.standard_normal(shape)
    inputs = (*(Tensor(a.astype(np.float32)) for a in arrays), Tensor(segments))
    y, *gradients = differentiated(CompiledAttention(PATH, heads), Tensor(slopes.astype(np.float32)), inputs, 3)
    np.testing.assert_allclose(y, attended(*arrays, segments, heads), rtol=1e-5, atol=1e-5)
    for which, gradient in enumerate(gradients):
        direction = draw.standard_normal(shape)
        ends = []
        for move in (1e-5, -1e-5):
            moved = list(arrays)
            moved[which] = arrays[which] + move * direction
            ends.append((attended(*moved, segments, heads) * slopes).sum())
        assert (gradient * direction).sum() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-3)


class Naive(nn.Cell):
    """All networks on all rows, each row's own taken; choices without a network give zero."""

    def __init__(self, form: FeedForwardSpec, ids: np.ndarray, k: int) -> None:
        super().__init__()
        self.network, self.take, self.each = Expert(LAYOUT, form, ms.float32), ops.Gather(), len(form.tensors)
        self.token = Tensor((np.arange(ids.size) // k).astype(np.int32))
        self.own_rows = [Tensor((ids == n).astype(np.float32).reshape(-1, 1)) for n in range(ids.max() + 1)]

    def construct(self, x, *weights):
        rows = self.take(x, self.token, 0)
        y = 0.0
        for n in range(len(self.own_rows)):
            y = y + self.network(rows, weights[self.each * n : self.each * (n + 1)]) * self.own_rows[n]
        return (y,)


class Networks(nn.Cell):
    def __init__(self, form: FeedForwardSpec, order: Tensor, offsets: Tensor, exact: int = 0) -> None:
        super().__init__()
        self.networks = CompiledFeedForward(PATH, form.activation, exact, len(form.tensors))
        self.order, self.offsets = order, offsets

    def construct(self, x, *weights):
        return self.networks(x, self.order, self.offsets, weights)


def planned(ids: np.ndarray, slots: int) -> tuple[Tensor, Tensor]:
    order = np.argsort(np.where(ids < 0, slots, ids), kind="stable").astype(np.int32)
    counts = np.bincount(ids[ids >= 0], minlength=slots)
    return Tensor(order), Tensor(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


FORMS = {
    "fast_gelu": FeedForwardSpec("fast_gelu"),
    "gelu": FeedForwardSpec("gelu"),
    "silu": FeedForwardSpec("silu", biases=False),
    "swiglu": FeedForwardSpec("silu", gated=True, biases=False),
}


@pytest.mark.parametrize("name, k", [("fast_gelu", 1), ("gelu", 2), ("silu", 1), ("swiglu", 1), ("swiglu", 3)])
def test_networks_on_their_own_rows(name, k):
    form = FORMS[name]
    tokens, hidden, ffn, slots = 300, 20, 36, 3
    ids = np.random.default_rng(1).integers(-1, slots, tokens * k)
    shapes = form.shapes(hidden, ffn).values()
    weights = [normal(*s, seed=10 * n + i) * 0.3 for n in range(slots) for i, s in enumerate(shapes)]
    x, slopes = normal(tokens, hidden), normal(tokens * k, hidden)
    results = differentiated(Networks(form, *planned(ids, slots)), slopes, (x, *weights), 1 + len(weights))
    assert_close(results, differentiated(Naive(form, ids, k), slopes, (x, *weights), 1 + len(weights)), 5e-6)
    assert (results[0][ids < 0] == 0).all()


@pytest.mark.parametrize("hidden, ffn, name", [(20, 36, "fast_gelu"), (512, 2048, "fast_gelu"), (256, 128, "swiglu")])
def test_an_exact_row_does_not_depend_on_the_others(hidden, ffn, name):
    shapes = FORMS[name].shapes(hidden, ffn).values()
    weights = [normal(*s, seed=n) * 0.1 for n in range(3) for s in shapes]
    x = normal(200, hidden).asnumpy()
    draw = np.random.default_rng(0)
    results = []
    for _ in range(4):
        ids = draw.integers(0, 3, 200)
        position = int(draw.integers(200))
        moved = draw.standard_normal(x.shape).astype(np.float32)
        moved[position], ids[position] = x[0], 1
        cell = Networks(FORMS[name], *planned(ids, 3), exact=64).set_train(False)
        results.append(cell(Tensor(moved), *weights)[0].asnumpy()[position])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_the_plan_of_a_gate_sorts_choices_by_expert():
    ids = np.random.default_rng(2).integers(0, 6, 40).astype(np.int32)
    order, offsets = CompiledPlan(PATH, 5)(Tensor(ids))
    np.testing.assert_array_equal(order.asnumpy(), np.argsort(ids, kind="stable"))
    np.testing.assert_array_equal(offsets.asnumpy(), np.concatenate([[0], np.cumsum(np.bincount(ids)[:5])]))


def test_what_is_not_finite_stays_visible():
    x = np.ones((4, 8), np.float32)
    x[1, 2] = np.nan
    linear = CompiledLinear(PATH)(Tensor(x), normal(8, 8), normal(8)).asnumpy()
    assert np.isnan(linear[1]).all() and np.isfinite(linear[[0, 2, 3]]).all()
    norm = CompiledLayerNorm(PATH, 1e-5)(Tensor(x), normal(8), normal(8))[0].asnumpy()
    assert np.isnan(norm[1]).all()
    losses = CompiledCrossEntropy(PATH)(Tensor(x), normal(5, 8), Tensor([0, 1, 2, 3], ms.int32))[0].asnumpy()
    assert np.isnan(losses[1]) and np.isfinite(losses[[0, 2, 3]]).all()
    segments = Tensor(np.zeros((1, 4), np.int32))
    y = CompiledAttention(PATH, 2)(Tensor(x), Tensor(x), Tensor(x), segments)[0].asnumpy()
    assert np.isnan(y[1:]).any(1).all()


def test_a_label_outside_the_vocabulary_is_refused():
    cell = CompiledCrossEntropy(PATH)
    with pytest.raises(RuntimeError):
        cell(normal(2, 8), normal(5, 8), Tensor([0, 5], ms.int32))[0].asnumpy()


def test_host_kernels_refuse_arrays_that_do_not_fit():
    kernels = HostKernels(PATH)
    good = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="float32"):
        kernels.adamw(good, good.copy(), good.copy(), np.ones(4), 0.9, 0.9, 0.1, 0.1, 0.1, 1e-8, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.square_sum(np.ones((4, 4), np.float32)[:, 1])


THREADS = """
import hashlib, os, sys
os.sched_setaffinity(0, {int(c) for c in sys.argv[1].split(",")})
os.environ["GLOG_v"] = "4"
import mindspore as ms, numpy as np
from mindspore import Tensor
ms.set_context(mode=ms.PYNATIVE_MODE)
from parallel.ops.compiled_kernels import CompiledLinear, CompiledFeedForward, library
draw = np.random.default_rng(0)
def t(*s): return Tensor(draw.standard_normal(s).astype(np.float32))
cell = CompiledFeedForward(library(), "fast_gelu")
order, offsets = Tensor(np.arange(700, dtype=np.int32)), Tensor([0, 300, 700], ms.int32)
weights = tuple(t(*s) for _ in range(2) for s in ((64, 130), (130,), (130, 64), (64,)))
y, u = cell.set_train()(t(700, 64), order, offsets, weights)
linear = CompiledLinear(library()).backward(t(700, 64), t(64, 300), t(700, 300))
digest = hashlib.sha256()
for array in (y, u, *linear): digest.update(array.asnumpy().tobytes())
print(digest.hexdigest())
"""


def test_the_number_of_threads_changes_no_bit():
    own_cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # a test process of several is bound to one processor
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, own_cpus)
    if len(cpus) < 2:
        pytest.skip("one processor only")
    results = {
        subprocess.run([sys.executable, "-c", THREADS, use], capture_output=True, text=True, check=True).stdout
        for use in (f"{cpus[0]}", f"{cpus[0]},{cpus[1]}")
    }
    assert len(results) == 1


def test_square_sums_of_tensors_of_all_sizes():
    tensors = [normal(3), normal(700, 513), normal(8192, 33, 2), normal(1, 1)]
    results = CompiledSquareSums(PATH, [t.shape for t in tensors])(*tensors).asnumpy()
    exact = [float((t.asnumpy().astype(np.float64) ** 2).sum()) for t in tensors]
    np.testing.assert_allclose(results, exact, rtol=2e-6)
    np.testing.assert_allclose(results, SquareSums(LAYOUT)(*tensors).asnumpy(), rtol=1e-3)


def test_a_square_sum_that_is_not_finite_stays_visible():
    spoiled = np.ones(100_000, np.float32)
    spoiled[77_777] = np.nan
    results = CompiledSquareSums(PATH, [(4,), (100_000,)])(normal(4), Tensor(spoiled)).asnumpy()
    assert np.isfinite(results[0]) and np.isnan(results[1])
