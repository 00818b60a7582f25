"""What holds a phase near the previous model: each term against PyTorch or by definition, and what keeps every bit."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from pangu_sigma.config.training_sections import RegulariseConfig
from pangu_sigma.errors import UserError
from pangu_sigma.model.scoring import Scorer
from pangu_sigma.train.continual.distillation import RegularisedObjective
from pangu_sigma.train.continual.fisher import draw_labels, estimate_fisher
from pangu_sigma.train.continual.teacher import Reference
from pangu_sigma.train.continual.weight_penalty import Distance
from pangu_sigma.train.objective import Objective
from parallel.operator_layout import Layout
from tests.pangu_sigma.train.small_trainer import (
    EXPERTS,
    LENGTH,
    batch,
    changed_names,
    small_config,
    small_model,
    small_trainer,
    tensors_now,
)

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
LINEAR = {"max_grad_norm": 1e9}


def gradients(trainer, drawn) -> dict[str, np.ndarray]:
    """Gradients of one first step by parameter: its first moments divided by 1 - beta1."""
    trainer.step(0, trainer.plan(drawn))
    moments = {n: t for n, t in tensors_now(trainer).items() if ".m." in n}
    return {name: array / 0.1 for name, array in moments.items()}


# --- the distance


@pytest.mark.parametrize("wanted", [{"l2": 0.3}, {"ewc": 2.0}, {"l2": 0.3, "ewc": 2.0}], ids=str)
def test_the_distances_penalty_and_pull_are_pytorchs(wanted):
    draw = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,), "grown": (2, 3)}
    now, old, fisher, given = (
        {n: np.abs(draw.standard_normal(s)).astype(np.float32) for n, s in shapes.items()} for _ in range(4)
    )
    old["grown"] = old["grown"][:, :2]  # the gate had fewer columns: it is not held
    parameters = [Parameter(Tensor(now[n]), name=n) for n in shapes]
    distance = Distance(parameters, old, fisher, RegulariseConfig(**wanted), Layout())
    changed, squares, penalty = distance(Tensor(4.0, ms.float32), *(Tensor(given[n]) for n in shapes))

    theta = {n: torch.tensor(now[n], dtype=torch.float64, requires_grad=True) for n in ("a", "b")}
    expected = sum(
        (0.5 * (wanted.get("l2", 0.0) + wanted.get("ewc", 0.0) * torch.tensor(fisher[n], dtype=torch.float64))
         * (t - torch.tensor(old[n])) ** 2).sum()
        for n, t in theta.items()
    )  # fmt: skip
    expected.backward()
    assert float(penalty.asnumpy()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, found, square in zip(shapes, changed, squares.asnumpy(), strict=True):
        pull = theta[name].grad.numpy() if name in theta else 0.0
        np.testing.assert_allclose(found.asnumpy(), given[name] + 4.0 * pull, rtol=1e-5)
        assert square == pytest.approx(float((found.asnumpy().astype(np.float64) ** 2).sum()), rel=1e-5)


def test_the_pull_enters_a_step_once_whatever_the_accumulation():
    drawn = batch(0, [0, 1, 2, 0])
    found = {}
    for parts in (1, 2):
        for strength in (None, 0.5):
            trainer = small_trainer(optimizer=LINEAR, train={"gradient_accumulation_steps": parts})
            if strength:
                parameters = trainer.model.net.trainable_params()
                zeros = {p.name: np.zeros(p.shape, np.float32) for p in parameters}
                trainer.hold(None, Distance(parameters, zeros, None, RegulariseConfig(l2=strength), Layout()))
            else:
                start = {p.name: p.asnumpy().copy() for p in trainer.model.net.trainable_params()}
            found[parts, strength] = gradients(trainer, drawn)
            figures = trainer.accounting.take()["figures"]
            assert ("distance" in figures) == bool(strength)
    for parts in (1, 2):
        for name, theta in start.items():
            pulled = found[parts, 0.5][f"optimizer.m.{name}"] - found[parts, None][f"optimizer.m.{name}"]
            np.testing.assert_allclose(pulled, 0.5 * theta, rtol=1e-3, atol=1e-5, err_msg=name)


# --- the divergence


@pytest.fixture(scope="module")
def other():
    """A frozen model of another seed."""
    config = small_config({"init_std": 0.3}, run={"seed": 7})
    return Reference(small_model(config), config, 4)


def regularised(output: float, reference, **train):
    trainer = small_trainer({"init_std": 0.3}, optimizer=LINEAR, train=train)
    trainer.hold(RegularisedObjective(reference, output), None)
    return trainer


def test_the_objectives_gradient_is_that_of_loss_and_divergence(other):
    """Of a parameter that every row depends on, along its gradient: against a central difference in float64 sums."""
    drawn = batch(0, [0, 1, 2, 0])
    trainer = regularised(0.7, other)
    (planned,) = trainer.plan(drawn)
    tokens = np.concatenate([planned.tokens, planned.labels[:, -1:]], 1)
    scorer = Scorer(trainer.model, 4, domains=3)
    q = torch.log_softmax(torch.tensor(other.logits(planned).asnumpy(), dtype=torch.float64), -1)

    def objective() -> tuple[float, float]:
        log_p = torch.log_softmax(torch.tensor(scorer.logits(tokens, drawn.domain).asnumpy(), dtype=torch.float64), -1)
        losses = torch.nn.functional.nll_loss(log_p.reshape(-1, log_p.shape[-1]),
                                              torch.tensor(planned.labels.reshape(-1), dtype=torch.long))  # fmt: skip
        kl = torch.nn.functional.kl_div(log_p, q, reduction="none", log_target=True).sum(-1).mean()
        return float(losses), float(kl)

    parameter = next(p for p in trainer.model.net.trainable_params() if p.name == "query_layer.feed_forward.up.weight")
    start = parameter.asnumpy().copy()
    loss, kl = objective()
    outcome = trainer.step(0, [planned])
    figures = trainer.accounting.take()
    assert outcome.loss == pytest.approx(loss, rel=1e-5)
    assert figures["figures"]["divergence"] == pytest.approx(kl, rel=1e-5) and kl > 0.01
    gradient = tensors_now(trainer)[f"optimizer.m.{parameter.name}"] / 0.1
    for p, value in trainer_start(trainer):
        p.set_data(Tensor(value))
    direction = gradient / np.linalg.norm(gradient)
    values = []
    for sign in (1, -1):
        parameter.set_data(Tensor(start + np.float32(sign * 0.02) * direction))
        loss, kl = objective()
        values.append(loss + 0.7 * kl)
    assert (values[0] - values[1]) / 0.04 == pytest.approx(np.linalg.norm(gradient), rel=5e-3)


def trainer_start(trainer):
    """Every parameter with the value that the model began with."""
    fresh = small_trainer({"init_std": 0.3})
    values = {p.name: p.asnumpy() for p in fresh.model.net.get_parameters()}
    for layer_name, name, table in ((p, n, t) for k, p, n, t in fresh.model.store.tables() if k == "weight"):
        trainer.model.store.table(layer_name, name)[...] = table
    return [(p, values[p.name]) for p in trainer.model.net.get_parameters()]


def test_a_model_is_not_held_back_from_itself():
    """The previous model's own gradient is that of the plain loss: the divergence has none there."""
    drawn = batch(0, [0, 1, 2, 0])
    config = small_config({"init_std": 0.3})
    itself = Reference(small_model(config), config, 4)
    plain = gradients(small_trainer({"init_std": 0.3}, optimizer=LINEAR), drawn)
    held = gradients(regularised(5.0, itself), drawn)
    for name, gradient in plain.items():
        np.testing.assert_allclose(held[name], gradient, rtol=1e-3, atol=2e-5, err_msg=name)


def test_micro_batches_of_a_held_step_add_up(other):
    drawn = batch(0, [0, 1, 2, 0])
    config = small_config({"init_std": 0.3}, run={"seed": 7})
    half = Reference(other.model, config, 2)
    whole = gradients(regularised(0.7, other), drawn)
    parts = gradients(regularised(0.7, half, gradient_accumulation_steps=2), drawn)
    for name, gradient in whole.items():
        np.testing.assert_allclose(parts[name], gradient, rtol=1e-3, atol=2e-6, err_msg=name)


def test_slots_of_their_own_have_the_same_divergence(other):
    model = {"init_std": 0.3, "domain_parameters": {"embedding": "own"}}
    config = small_config(model, run={"seed": 7})
    reference = Reference(small_model(config), config, 4)
    trainer = small_trainer(model, optimizer=LINEAR)
    trainer.hold(RegularisedObjective(reference, 0.5), None)
    drawn = batch(0, [0, 1, 2, 0])
    (planned,) = trainer.plan(drawn)
    now = Scorer(trainer.model, 4, domains=3).logits(planned.sequences, drawn.domain).asnumpy()
    log_p, log_q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1)
                    for x in (now, reference.logits(planned).asnumpy()))  # fmt: skip
    expected = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
    trainer.step(0, [planned])
    assert trainer.accounting.take()["figures"]["divergence"] == pytest.approx(float(expected), rel=1e-4)


def test_new_text_is_compared_under_an_old_domains_experts(other):
    """The loss is the text's own, the divergence that of both models under the old domain, whose experts feel it."""
    drawn = batch(0, [2, 2, 2, 2])
    law = list(EXPERTS).index("law")
    for objective in (None, RegularisedObjective(other, 0.7, through=[law])):
        trainer = small_trainer({"init_std": 0.3}, optimizer=LINEAR)
        trainer.hold(objective, None)
        (planned,) = trainer.plan(drawn)
        logits = [Scorer(model, 4).logits(planned.sequences, [law] * 4).asnumpy().copy()
                  for model in (trainer.model, other.model)]  # fmt: skip
        outcome = trainer.step(0, [planned])
        if objective is None:
            expected_loss, plain = outcome.loss, tensors_now(trainer)
    log_p, log_q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in logits)
    kl = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
    record = trainer.accounting.take()
    assert outcome.loss == pytest.approx(expected_loss, rel=1e-5) and record["tokens"] == {"poems": 4 * LENGTH}
    assert record["figures"]["divergence"] == pytest.approx(float(kl), rel=1e-4)
    held = tensors_now(trainer)
    up = "blocks.0.experts.up.weight"
    assert held[f"domains.law.optimizer.m.{up}"].any() and not plain[f"domains.law.optimizer.m.{up}"].any()
    np.testing.assert_allclose(
        held[f"domains.poems.optimizer.m.{up}"], plain[f"domains.poems.optimizer.m.{up}"], rtol=1e-3, atol=1e-7
    )
    assert not np.allclose(held["optimizer.m.embedding.word"], plain["optimizer.m.embedding.word"], atol=1e-4)


def test_an_old_domain_is_drawn_for_every_micro_batch_the_same_way(other):
    objective = RegularisedObjective(other, 0.7, through=[0, 1], seed=3)
    trainer = small_trainer({"init_std": 0.3})
    drawn = []
    for step in range(12):
        planned = trainer.plan(batch(step, [2, 2, 2, 2]))
        beside = objective.beside(planned, trainer.planner)
        assert not beside[0].mask.any() and beside[0].held.all() and (beside[0].tokens == planned[0].tokens).all()
        again = objective.beside(planned, trainer.planner)
        assert (again[0].domain == beside[0].domain).all() and len(set(beside[0].domain.tolist())) == 1
        drawn.append(int(beside[0].domain[0]))
    assert set(drawn) == {0, 1}


def test_another_loss_than_all_tokens_mean_is_not_held_by_outputs(other):
    class Another(Objective):
        pass

    from pangu_sigma.train.trainer import Trainer

    trainer = Trainer(small_model(small_config()), Another())
    with pytest.raises(UserError, match=r"regularise\.output holds training on text"):
        trainer.hold(RegularisedObjective(other, 1.0), None)


# --- the Fisher information


def test_labels_are_drawn_by_the_models_probabilities():
    logits = np.log(np.array([[[0.5, 0.25, 0.125, 0.125]]], np.float32)).repeat(20000, 1)
    first = np.zeros(1, int)
    counts = np.bincount(draw_labels(logits, 5, first)[0], minlength=4)
    np.testing.assert_allclose(counts / 20000, [0.5, 0.25, 0.125, 0.125], atol=0.012)
    same, other = draw_labels(logits, 5, first), draw_labels(logits, 6, first)
    assert draw_labels(logits, 5, first).tobytes() == same.tobytes() != other.tobytes()
    # A process that has the second row alone draws what one that has both does.
    two = draw_labels(logits.repeat(2, 0), 5, np.arange(2))
    assert two[1:].tobytes() == draw_labels(logits, 5, first + 1).tobytes() != two[:1].tobytes()


def test_the_fisher_information_is_the_expected_squared_gradient():
    """Against its definition, label by label, for the last norm of a model that sees one sequence again and again."""
    config = small_config({"vocab_size": 12, "init_std": 0.3})
    model = small_model(config)
    sequence = batch(3, [0], range(3, 12)).tokens
    estimate = estimate_fisher(model, (("code", sequence) for _ in range(1500)), seed=1, rows=1)
    name = "query_layer.norm2.gamma"
    assert name in estimate
    exact = exact_fisher(model, sequence, name)
    # 1,500 draws: about 1/sqrt(1500/2) of relative error each.
    np.testing.assert_allclose(estimate[name], exact, rtol=0.25)
    assert estimate[name].sum() == pytest.approx(exact.sum(), rel=0.07)


def exact_fisher(model, sequence: np.ndarray, name: str) -> np.ndarray:
    from pangu_sigma.train.continual.fisher import SharedGradient

    scorer = Scorer(model, 1)
    graph = SharedGradient(scorer).set_train(False)
    planned = scorer.plan(sequence, [0])
    at = [p.name for p in model.net.trainable_params()].index(name)
    p = np.exp(token_log_probabilities_of_all(scorer.logits(sequence, [0]).asnumpy()[0]))
    total = 0.0
    for t in range(LENGTH):
        weights = np.zeros((1, LENGTH), np.float32)
        weights[0, t] = 1.0
        for label in range(p.shape[1]):
            labels = np.full((1, LENGTH), label, np.int32)
            fixed = planned.fixed
            found = graph(fixed[0], Tensor(labels), Tensor(weights), Tensor(0.0, ms.float32), *fixed[1:],
                          *scorer.flat(planned))  # fmt: skip
            total = total + p[t, label] * found[at].asnumpy().astype(np.float64) ** 2
    return total / LENGTH


def token_log_probabilities_of_all(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


# --- gates


@pytest.mark.parametrize("router", ["switch", "noisy_top_k"])
def test_the_gate_columns_of_frozen_experts_keep_every_bit(router):
    phases = [{"domains": ["poems"]}]
    sparse = {"router": router, **({"top_k": 2} if router == "noisy_top_k" else {})}
    trainer = small_trainer({"sparse": sparse}, train={"phases": phases})
    before = tensors_now(trainer)
    old = EXPERTS["code"] + EXPERTS["law"]
    for step in range(3):
        trainer.step(step, trainer.plan(batch(step, [2, 2, 2, 2])))
    after = tensors_now(trainer)
    gates = [name for name in after if ".router." in name]
    assert len(gates) == (3 if router == "switch" else 6)
    for name in gates:
        assert before[name][:, :old].tobytes() == after[name][:, :old].tobytes(), name
    assert (before["blocks.0.router.weight"][:, old:] != after["blocks.0.router.weight"][:, old:]).any()
    moved = changed_names(before, after)
    assert "embedding.word" in moved
    assert not {name for name in moved if name.startswith(("domains.code.", "domains.law."))}


