"""The weight penalty of L2 and EWC: its value and gradient against PyTorch's, and how it enters a step."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from pangu_sigma.config.training_sections import RegulariseConfig
from pangu_sigma.training.continual.weight_penalty import WeightPenalty
from pangu_sigma.training.trainer import NO_REGULARISER, Regulariser
from parallel.operator_layout import Layout
from tests.pangu_sigma.training.small_trainer import batch, first_step_gradients, small_trainer

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
# Gradients are not clipped, so that they can be compared.
LINEAR = {"max_grad_norm": 1e9}


@pytest.mark.parametrize("strengths", [{"l2": 0.3}, {"ewc": 2.0}, {"l2": 0.3, "ewc": 2.0}], ids=str)
def test_the_penalty_and_its_gradient_are_pytorchs(strengths):
    draw = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,), "grown": (2, 3)}
    now, old, fisher, given = (
        {n: np.abs(draw.standard_normal(s)).astype(np.float32) for n, s in shapes.items()} for _ in range(4)
    )
    old["grown"] = old["grown"][:, :2]  # the gate had fewer columns: it is not penalised
    parameters = [Parameter(Tensor(now[n]), name=n) for n in shapes]
    weight_penalty = WeightPenalty(parameters, old, fisher, RegulariseConfig(**strengths), Layout())
    with_penalty, squares, penalty = weight_penalty(Tensor(4.0, ms.float32), *(Tensor(given[n]) for n in shapes))

    theta = {n: torch.tensor(now[n], dtype=torch.float64, requires_grad=True) for n in ("a", "b")}
    expected = sum(
        (0.5 * (strengths.get("l2", 0.0) + strengths.get("ewc", 0.0) * torch.tensor(fisher[n], dtype=torch.float64))
         * (t - torch.tensor(old[n])) ** 2).sum()
        for n, t in theta.items()
    )  # fmt: skip
    expected.backward()
    assert float(penalty.asnumpy()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, gradient, square in zip(shapes, with_penalty, squares.asnumpy(), strict=True):
        pull = theta[name].grad.numpy() if name in theta else 0.0
        np.testing.assert_allclose(gradient.asnumpy(), given[name] + 4.0 * pull, rtol=1e-5)
        assert square == pytest.approx(float((gradient.asnumpy().astype(np.float64) ** 2).sum()), rel=1e-5)


def test_the_penalty_enters_a_step_once_whatever_the_accumulation():
    drawn = batch(0, [0, 1, 2, 0])
    of_step = {}
    for parts in (1, 2):
        for strength in (None, 0.5):
            trainer = small_trainer(optimizer=LINEAR, train={"gradient_accumulation_steps": parts})
            regulariser = NO_REGULARISER
            if strength:
                parameters = trainer.model.net.trainable_params()
                zeros = {p.name: np.zeros(p.shape, np.float32) for p in parameters}
                penalty = WeightPenalty(parameters, zeros, None, RegulariseConfig(l2=strength), Layout())
                regulariser = Regulariser(penalty=penalty)
            else:
                start = {p.name: p.asnumpy().copy() for p in trainer.model.net.trainable_params()}
            of_step[parts, strength] = first_step_gradients(trainer, drawn, regulariser)
            extra_metrics = trainer.take_record()["figures"]
            assert ("distance" in extra_metrics) == bool(strength)
    for parts in (1, 2):
        for name, theta in start.items():
            pulled = of_step[parts, 0.5][f"optimizer.m.{name}"] - of_step[parts, None][f"optimizer.m.{name}"]
            np.testing.assert_allclose(pulled, 0.5 * theta, rtol=1e-3, atol=1e-5, err_msg=name)
