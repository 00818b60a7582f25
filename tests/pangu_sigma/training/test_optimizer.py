"""One optimizer over shared parameters and experts: torch's AdamW, one global norm, sums over micro-batches."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from pangu_sigma.training.gradients import Gradients
from pangu_sigma.training.step import SharedUpdate
from parallel.operator_layout import Layout
from rre.adamw import AdamWHyperparameters
from rre.store import DeviceStore
from tests.pangu_sigma.training.small_trainer import batch, small_trainer, step_on, tensors_now

MOMENTS = ("optimizer.m.", "optimizer.v.")
SHAPES = {"embedding.word": (7, 5), "blocks.0.norm1.gamma": (5,), "blocks.0.attention.query.bias": (5,)}


def test_shared_parameters_are_updated_as_torchs_adamw_does():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    start = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    ours = [Parameter(Tensor(value), name=name) for name, value in start.items()]
    update = SharedUpdate(ours, Layout("CPU"))
    theirs = [torch.nn.Parameter(torch.tensor(value)) for value in start.values()]
    optimizer = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.3}, {"params": theirs[1:], "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-6,
    )  # fmt: skip
    for step in range(1, 21):
        rate, scale = 1e-2 / step, 0.5
        values = [10.0 ** draw.uniform(-4, 1) * draw.standard_normal(s) for s in SHAPES.values()]
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, value in zip(theirs, values, strict=True):
            parameter.grad = torch.tensor((scale * value).astype(np.float32))
        optimizer.step()
        corrected, epsilon, decay = AdamWHyperparameters(rate, 0.9, 0.95, 1e-6, 0.3).correct_bias(step)
        terms = [Tensor(np.float32(v)) for v in (scale, corrected, 0.9, 0.95, epsilon, decay)]
        update(*terms, *(Tensor(v.astype(np.float32)) for v in values))
        for our_tensor, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(
                our_tensor.asnumpy(), other.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=our_tensor.name
            )


def norm(gradients: Gradients) -> float:
    shared, by_layer = gradients.square_sums(DeviceStore({}, {}))
    return float(np.sqrt(shared.sum() + sum(by_layer.values())))


def test_the_global_norm_is_numpys():
    draw = np.random.default_rng(1)
    values = [draw.standard_normal(shape).astype(np.float32) for shape in ((30, 4), (9,), (3, 3), (5,))]
    gradients = Gradients(
        shared=(Tensor(values[0]), Tensor(values[1])), experts={("blocks.0", 1): [Tensor(values[2]), Tensor(values[3])]}
    )
    expected = np.sqrt(sum((v.astype(np.float64) ** 2).sum() for v in values))
    assert norm(gradients) == pytest.approx(expected, rel=1e-6)


def test_micro_batches_add_up_expert_by_expert():
    one, two = np.ones(3, np.float32), np.full(3, 2, np.float32)
    gradients = Gradients((Tensor(one),), {("blocks.0", 0): [Tensor(one)]}, shared_squares=np.array([3.0]))
    gradients.add(Gradients((Tensor(two),), {("blocks.0", 0): [Tensor(two)], ("blocks.0", 4): [Tensor(one)]}, 1.0))
    sums = {key: [t.asnumpy().tolist() for t in tensors] for key, tensors in gradients.experts.items()}
    assert sums == {("blocks.0", 0): [[3, 3, 3]], ("blocks.0", 4): [[1, 1, 1]]}
    assert norm(gradients) == pytest.approx(np.sqrt(27 + 27 + 3))


@pytest.fixture(
    scope="module", params=[{}, {"domain_parameters": {"embedding": "own"}}], ids=["one table", "embedding slots"]
)
def clipped(request):
    """(result of a step clipped to a norm of 0.01, moments after it): the first moment is 0.1 x the gradient."""
    trainer = small_trainer(request.param, optimizer={"max_grad_norm": 0.01})
    result = step_on(trainer, 0, batch(0, [0, 1, 2, 0]))
    return result, {n: t for n, t in tensors_now(trainer).items() if "optimizer.m." in n}


def test_a_large_gradient_is_scaled_to_the_largest_norm(clipped):
    result, first_moments = clipped
    assert result.gradient_norm > 0.1
    squares = sum((10 * t.astype(np.float64) ** 2 * 10).sum() for t in first_moments.values())
    assert np.sqrt(squares) == pytest.approx(0.01, rel=1e-5)


@pytest.fixture(scope="module")
def accumulated():
    """accumulation -> (results of three steps, tensors after them), for 8 samples as 1 x 8, 2 x 4 and 4 x 2."""
    by_parts = {}
    for parts in (1, 2, 4):
        trainer = small_trainer(train={"batch_size": 8, "gradient_accumulation_steps": parts})
        results = [step_on(trainer, s, batch(s, [0, 1, 2, 0, 2, 2, 1, 0])) for s in range(3)]
        by_parts[parts] = results, tensors_now(trainer)
    return by_parts


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_do_what_one_batch_does(accumulated, parts):
    unsplit, tensors = accumulated[1]
    results, others = accumulated[parts]
    for one, other in zip(unsplit, results, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    # A key's bias moves all scores of a query alike, so its gradient is nothing but rounding: moments are compared on
    # the scale of the largest. Adam divides a gradient by its own size, so one near zero moves a weight by a visible
    # part of the learning rate, which is 0.01.
    tolerance = {kind: 1e-5 * max(np.abs(t).max() for n, t in tensors.items() if kind in n) for kind in MOMENTS}
    for name, tensor in tensors.items():
        kind = next((kind for kind in MOMENTS if kind in name), None)
        np.testing.assert_allclose(others[name], tensor, rtol=0, atol=tolerance.get(kind, 1e-4), err_msg=name)
        if tensor.dtype.kind == "i":
            np.testing.assert_array_equal(others[name], tensor, err_msg=name)
