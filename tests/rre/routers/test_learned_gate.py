"""Every learned gate with its experts against a NumPy oracle: what is assigned, weighed, dropped and added to the loss,
under both dispatches and both kinds of kernels; and every gradient, against finite differences."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from mindspore import ParameterTuple, Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import library
from rre.every_expert_layer import EveryExpertFeedForward
from rre.feed_forward_spec import FeedForwardSpec
from rre.router_specs import MIXTURE_GATE, ROUTER_OPTIONS, ROUTER_SPECS
from rre.routers import ExpertGroups, RouterOptions, build_router
from rre.sparse_layer import SparseFeedForward
from tests.oracles import routers_numpy

SAMPLES, LENGTH, HIDDEN, FFN = 2, 8, 6, 5
TOKENS = SAMPLES * LENGTH
GROUPS = ExpertGroups(("code", "law"), (3, 2))
EXPERTS = GROUPS.total
SPECS = {**ROUTER_SPECS, MIXTURE_GATE.name: MIXTURE_GATE}
WEIGHTS = {"aux_loss_weight": 0.4, "z_loss_weight": 0.05, "importance_loss_weight": 0.3, "load_loss_weight": 0.2}
# case -> (router, what differs in its options and settings). Capacity acts in training alone.
CASES = {
    "switch": ("switch", {"jitter": 0.1}),
    "switch capacity": ("switch", {"jitter": 0.1, "capacity_factor": 1.0}),
    "gshard": ("gshard", {"top_k": 2}),
    "switch capacity of the batch": ("switch", {"capacity_factor": 0.8, "capacity_samples": 2}),
    "gshard capacity of the batch": ("gshard", {"top_k": 2, "capacity_factor": 0.8, "capacity_samples": 2}),
    "gshard capacity": ("gshard", {"top_k": 2, "capacity_factor": 0.8}),
    "glam capacity": ("glam", {"top_k": 2, "capacity_factor": 0.8}),
    "noisy_top_k": ("noisy_top_k", {"top_k": 2}),
    "noisy_top_k capacity": ("noisy_top_k", {"top_k": 3, "capacity_factor": 0.9}),
    "olmoe": ("olmoe", {"top_k": 3}),
    "olmoe capacity, renormalised": ("olmoe", {"top_k": 3, "capacity_factor": 0.9, "renormalise": True}),
    "expert_choice": ("expert_choice", {"top_k": 2}),
    "every_expert": ("every_expert", {"top_k": 5}),
    "every_expert unmixed": ("every_expert", {"top_k": 5, "log_weights": True}),
}


def options_of(kind: str, seed: int = 7, layer: int = 1, layout: Layout | None = None, **changes) -> RouterOptions:
    settings = WEIGHTS | {name: changes.pop(name) for name in tuple(changes) if name in ROUTER_OPTIONS}
    base = RouterOptions(SPECS[kind], GROUPS, HIDDEN, LENGTH, layout or Layout(), layer, seed, settings=settings)
    return dataclasses.replace(base, **changes)


class GateObjective(nn.Cell):
    """sum(y * slopes) + auxiliary loss, with y, the auxiliary loss and the rows beside it. Where the experts stay
    unmixed, their own losses are -(y_i * slopes), and y [T, 1] is the tokens' loss."""

    def __init__(self, router, layout: Layout) -> None:
        super().__init__()
        self.unmixed = router.options.log_weights
        layer = EveryExpertFeedForward if self.unmixed else SparseFeedForward
        self.layer = layer(
            router.cell(), layout, FeedForwardSpec("gelu"), ms.float32,
            expert_choice=router.options.spec.experts_choose,
        )  # fmt: skip

    def construct(self, x, slopes, *flat):
        noise, weights = flat[: -4 * EXPERTS], flat[-4 * EXPERTS :]
        y, auxiliary, rows = self.layer(x, noise, weights)
        if self.unmixed:
            outputs, shares = y
            scores = (outputs.reshape(EXPERTS, -1, HIDDEN) * slopes).sum(2).transpose(1, 0) + shares
            y = -ops.log(ops.exp(scores).sum(1, keepdims=True))
            return y.sum() + auxiliary, y, auxiliary, rows
        return (y * slopes).sum() + auxiliary, y, auxiliary, rows


class WithGradients(nn.Cell):
    """`GateObjective` and its gradients by x and by the gate's parameters."""

    def __init__(self, objective: GateObjective) -> None:
        super().__init__(auto_prefix=False)
        self.objective = objective
        self.found = ops.value_and_grad(objective, 0, ParameterTuple(objective.trainable_params()), has_aux=True)

    def construct(self, x, slopes, *flat):
        return self.found(x, slopes, *flat)


def network(rows, weights):
    up, up_bias, down, down_bias = weights
    u = rows @ up + up_bias
    return (0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))) @ down + down_bias


class Case:
    """One gate with given weights, and the oracle's answers to the same."""

    def __init__(self, name: str, kernels: str | None = None, padded: bool = False) -> None:
        self.kind, changes = CASES[name]
        changes = changes | {"padded": padded}
        # The first sample has 5 tokens of text, the second one is whole.
        self.text = np.arange(TOKENS) % LENGTH < np.repeat([5, LENGTH], LENGTH) if padded else np.ones(TOKENS, bool)
        layout = Layout(kernels=kernels)
        self.options = options_of(self.kind, layout=layout, **changes)
        self.router = build_router(self.options)
        draw = np.random.default_rng(3)

        def normal(*shape: int) -> np.ndarray:
            return draw.standard_normal(shape).astype(np.float32)

        self.x, self.slopes = normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN)
        self.experts = [[normal(HIDDEN, FFN), normal(FFN), normal(FFN, HIDDEN), normal(HIDDEN)] for _ in range(EXPERTS)]
        self.objective = GateObjective(self.router, layout)
        self.gates = {p.name.rsplit(".", 1)[-1]: normal(*p.shape) for p in self.objective.trainable_params()}
        for parameter in self.objective.trainable_params():
            parameter.set_data(Tensor(self.gates[parameter.name.rsplit(".", 1)[-1]]))
        self.noise = []
        if self.router.noise_shape(TOKENS):
            self.noise = [self.router.noise(4, np.array([11, 12]))]
            assert self.noise[0].shape == self.router.noise_shape(TOKENS) and self.noise[0].dtype == np.float32

    def flat(self, noise, training: bool = True) -> list[Tensor]:
        text = [self.text.astype(np.float32)[:, None]] if self.options.padded and training else []
        assert [t.shape for t in text] == [s for s in [self.router.text_shape(TOKENS)] if s and training]
        return [Tensor(a) for a in (*noise, *text, *(w for expert in self.experts for w in expert))]

    def route(self, x, gates, noise) -> routers_numpy.Routed:
        """The oracle's answer of the text alone; padding has no weight and no choice."""
        if self.text.all():
            return self.route_text(x, gates, noise)
        text = [np.flatnonzero(self.text)]
        if self.kind == "expert_choice":  # sample by sample
            text = [text[0][text[0] // LENGTH == sample] for sample in range(SAMPLES)]
        whole = routers_numpy.Routed(np.zeros((TOKENS, EXPERTS)), [[] for _ in range(TOKENS)], 0.0)
        for places in text:
            routed = self.route_text(x[places], gates, [n[places] for n in noise])
            whole.weights[places] = routed.weights
            for place, order in zip(places, routed.order, strict=True):
                whole.order[place][:] = order
            whole = replace(whole, auxiliary=whole.auxiliary + routed.auxiliary)
        return whole

    def route_text(self, x, gates, noise) -> routers_numpy.Routed:
        o, g, n = self.options, gates["weight"], (noise[0].astype(np.float64) if noise else None)
        balance, k = o.settings["aux_loss_weight"], o.top_k
        if self.kind == "switch":
            return routers_numpy.switch(x, g, balance, n)
        if self.kind in ("gshard", "glam"):
            return routers_numpy.gshard(x, g, balance, n)
        if self.kind == "noisy_top_k":
            return routers_numpy.noisy_top_k(
                x, g, gates["noise_weight"], k, WEIGHTS["importance_loss_weight"], WEIGHTS["load_loss_weight"], n
            )
        if self.kind == "olmoe":
            return routers_numpy.olmoe(x, g, k, balance, WEIGHTS["z_loss_weight"], o.setting("renormalise"))
        if self.kind == "every_expert":
            return routers_numpy.adaptive_mixture(x, g)
        length = min(LENGTH, len(x))
        return routers_numpy.expert_choice(x, g, min(4, length), length)  # ceil(8 tokens * 2 / 5 experts)

    def kept(self, routed: routers_numpy.Routed, training: bool) -> list[list[int]]:
        factor = self.options.capacity_factor
        group = self.options.capacity_samples * LENGTH
        capacity = None if factor is None or not training else int(np.ceil(factor * self.options.top_k * group / 5))
        return routers_numpy.kept(routed.order, EXPERTS, group, capacity)

    def answer(self, x, gates, noise, training: bool):
        """(y, auxiliary loss, kept choices, all choices) by the oracle."""
        routed = self.route(x, gates, noise)
        kept = self.kept(routed, training)
        experts = [[w.astype(np.float64) for w in expert] for expert in self.experts]
        if self.options.log_weights:
            losses = -np.stack([(network(x, weights) * self.slopes).sum(1) for weights in experts], 1)
            y = routers_numpy.competitive_loss(routed.weights, losses)[:, None]
            return y, routed.auxiliary, kept, routed.order
        y = np.zeros(x.shape)
        for t, chosen in enumerate(kept):
            for e in chosen:
                y[t] += routed.weights[t, e] * network(x[t], experts[e])
        return y, routed.auxiliary, kept, routed.order


@pytest.fixture(scope="module", params=["composed", "compiled"])
def made(request):
    """Case name -> its gate, made once."""
    kernels = library() if request.param == "compiled" else None
    if request.param == "compiled" and kernels is None:
        pytest.skip("no compiled kernels in this installation")
    cases: dict[str, Case] = {}

    def make(name: str, padded: bool = False) -> Case:
        key = f"{name} padded" if padded else name
        if key not in cases:
            cases[key] = Case(name, kernels, padded)
        return cases[key]

    return make


def exact(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return case.x.astype(np.float64), {n: g.astype(np.float64) for n, g in case.gates.items()}


def agree(case: Case, results, expected) -> None:
    """y, auxiliary loss and rows are the oracle's."""
    y, auxiliary, rows = results
    np.testing.assert_allclose(y.asnumpy(), expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(auxiliary.asnumpy(), expected[1], rtol=1e-5, atol=1e-7)
    _, _, kept, order = expected
    for sample in range(SAMPLES):
        tokens = range(sample * LENGTH, (sample + 1) * LENGTH)
        taken = np.bincount([e for t in tokens for e in kept[t]], minlength=EXPERTS)
        np.testing.assert_array_equal(rows.asnumpy()[sample, :-1], taken)
        lost = sum(len(order[t]) - len(kept[t]) for t in tokens) / case.options.top_k
        if case.kind == "expert_choice":
            lost = sum(not kept[t] for t in tokens if case.text[t])
        np.testing.assert_allclose(rows.asnumpy()[sample, -1], lost, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_the_oracles_and_so_is_every_gradient(made, name):
    agree_in_training(made(name))


# One of every gate and of every loss.
@pytest.mark.parametrize(
    "name",
    ["switch capacity", "gshard capacity of the batch", "noisy_top_k capacity", "olmoe", "expert_choice",
     "every_expert"],
)  # fmt: skip
def test_padding_chooses_no_expert_takes_no_room_and_counts_in_no_loss(made, name):
    agree_in_training(made(name, padded=True))


def agree_in_training(case: Case) -> None:
    """Outputs, auxiliary loss, rows and all gradients of a training step are the oracle's."""
    step = WithGradients(case.objective)
    step.set_train()
    (_, y, auxiliary, rows), (dx, dgates) = step(Tensor(case.x), Tensor(case.slopes), *case.flat(case.noise))
    x, gates = exact(case)
    expected = case.answer(x, gates, case.noise, True)
    agree(case, (y, auxiliary, rows), expected)
    if case.options.capacity_factor is not None:
        assert sum(map(len, expected[2])) < sum(map(len, expected[3]))  # something was dropped
    slopes = case.slopes.astype(np.float64)

    def objective(values: dict[str, np.ndarray]) -> float:
        y, auxiliary, _, _ = case.answer(values["x"], values, case.noise, True)
        return float((y if case.options.log_weights else y * slopes).sum() + auxiliary)

    gradients = {"x": dx.asnumpy()}
    gradients |= {p.name.rsplit(".", 1)[-1]: g.asnumpy() for p, g in
                  zip(case.objective.trainable_params(), dgates, strict=True)}  # fmt: skip
    for tensor, gradient in gradients.items():
        values = {"x": x, **gates}
        for entry in list(np.ndindex(gradient.shape))[:: 3 if tensor == "x" else 1]:
            ends = []
            for move in (1e-6, -1e-6):
                moved = values[tensor].copy()
                moved[entry] += move
                ends.append(objective({**values, tensor: moved}))
            np.testing.assert_allclose(gradient[entry], (ends[0] - ends[1]) / 2e-6, rtol=2e-3, atol=2e-3)
        assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("name", [n for n in CASES if "capacity" in n or n in ("gshard", "expert_choice")])
def test_evaluation_has_no_noise_and_drops_nothing(made, name):
    case = made(name)
    case.objective.set_train(False)
    _, y, auxiliary, rows = case.objective(Tensor(case.x), Tensor(case.slopes), *case.flat([], training=False))
    expected = case.answer(*exact(case), [], False)
    agree(case, (y, auxiliary, rows), expected)
    if case.kind != "expert_choice":
        assert all(len(order) == case.options.top_k for order in expected[2])


class Choice(nn.Cell):
    """What a gate whose tokens choose decides in a training step: expert ids and combine weights [T, k]."""

    def __init__(self, gate: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.gate = gate

    def construct(self, x, *noise):
        chosen = self.gate.choose(x, noise)
        return chosen[0], chosen[1]


# One case of every kind of gate: room is given after the choice.
CHOOSE = ["switch", "gshard", "glam capacity", "noisy_top_k", "olmoe", "olmoe capacity, renormalised"]


@pytest.mark.parametrize("name", [*CHOOSE, "every_expert", "every_expert unmixed"])
def test_every_token_is_assigned_as_the_oracle_assigns_it_with_its_weights(made, name):
    """Expert choice, whose experts assign, is held to it by its outputs above."""
    case = made(name)
    ids, weights = (t.asnumpy() for t in Choice(case.objective.layer.router)(Tensor(case.x), *map(Tensor, case.noise)))
    expected = case.route(*exact(case), case.noise)
    weights = np.exp(weights) if case.options.log_weights else weights
    for t, order in enumerate(expected.order):
        used = ids[t] < EXPERTS
        assert ids[t][used].tolist() == order
        np.testing.assert_allclose(weights[t][used], expected.weights[t, order], rtol=1e-4)


@pytest.mark.parametrize("kind", ["switch", "gshard", "noisy_top_k"])
def test_noise_follows_seed_step_sample_and_layer_alone(kind):
    options = {"top_k": 2, **({"jitter": 0.1} if kind == "switch" else {})}
    drawn = partial(build_router(options_of(kind, **options)).noise, 4)
    both = drawn(np.array([11, 12]))
    np.testing.assert_array_equal(np.concatenate([drawn(np.array([n])) for n in (11, 12)]), both)
    others = [
        build_router(options_of(kind, **options)).noise(5, np.array([11, 12])),
        drawn(np.array([13, 12])),
        build_router(options_of(kind, seed=8, **options)).noise(4, np.array([11, 12])),
        build_router(options_of(kind, layer=0, **options)).noise(4, np.array([11, 12])),
    ]
    assert all((other[:LENGTH] != both[:LENGTH]).any() for other in others)


def test_a_noisy_gate_needs_an_expert_that_is_not_chosen():
    with pytest.raises(ValueError, match="needs more than 5 experts"):
        build_router(options_of("noisy_top_k", top_k=5)).cell()
