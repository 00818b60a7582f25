"""Drives the real model in tests: tensors under their checkpoint names in, logits, losses and gradients out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.forward_pass import ForwardPass, Logits, WeightedLoss
from pangu_sigma.model.graph_inputs import GraphInputs, LayerInputs
from pangu_sigma.model.pangu import PanGuSigma
from parallel.operator_layout import Layout
from rre.dispatch.dispatch_plan import plan_by_expert, plan_in_blocks, plan_present
from rre.feed_forward_spec import FeedForwardSpec
from rre.routers import ExpertGroups, RouterOptions, build_router
from tests.oracles import pangu_numpy

EOD = 3


@dataclass(frozen=True)
class Batch:
    """tokens, labels int32 [B,S], domain [B], loss weights float32 [B,S], global sample numbers [B]."""

    tokens: np.ndarray
    labels: np.ndarray
    domain: np.ndarray
    weights: np.ndarray
    samples: np.ndarray


def make_batch(seed: int, vocab: int, batch: int, length: int, domains: int) -> Batch:
    """Random text with several documents per sample; some tokens have no weight in the loss."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, vocab, (batch, length + 1))
    ids[draw.random(ids.shape) < 0.1] = EOD
    weights = draw.random((batch, length)) * (draw.random((batch, length)) < 0.8) / (batch * length)
    return Batch(
        ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32), np.arange(batch) % domains,
        weights.astype(np.float32), np.arange(batch) + 100 * seed,
    )  # fmt: skip


def make_tensors(config: ModelConfig, vocab: int, groups: ExpertGroups, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the model, float32, large enough that each part of the function shows in the logits."""
    draw = np.random.default_rng(seed)
    hidden, ffn = config.hidden, config.ffn

    def normal(shape: tuple[int, ...], std: float, mean: float = 0.0) -> np.ndarray:
        return (mean + std * draw.standard_normal(shape)).astype(np.float32)

    tensors = {}
    if config.position == "learned":
        tensors["embedding.position"] = normal((config.positions, hidden), 0.3)
    if config.head == "untied":
        tensors["head.word"] = normal((vocab, hidden), 0.5)
    if config.domain_parameters.embedding == "shared":
        tensors["embedding.word"] = normal((vocab, hidden), 0.5)
    else:
        tensors |= {f"domains.{d}.embedding.word": normal((vocab, hidden), 0.5) for d in groups.names}
    layers = [f"blocks.{i}" for i in range(config.blocks)]
    if config.query_layer == "next_position":
        tensors["embedding.query"] = normal((config.positions, hidden), 0.7)
        layers.append("query_layer")
    norms = ["norm1", "norm2", *(["attention.query_norm", "attention.key_norm"] if config.attention.qk_norm else [])]
    for norm in ["norm", *(f"{p}.{n}" for p in layers for n in norms)]:
        tensors[f"{norm}.gamma"] = normal((hidden,), 0.2, 1.0)
        if config.norm == "layernorm":
            tensors[f"{norm}.beta"] = normal((hidden,), 0.2)
    def matrices_of(form: FeedForwardSpec) -> dict[str, tuple[int, ...]]:
        shapes = {"up": (hidden, ffn), "down": (ffn, hidden)}
        return shapes | {"gate": (hidden, ffn)} if form.gated else shapes

    shapes = matrices_of(config.expert_network)
    for p in layers:
        matrices = {f"{p}.attention.{part}": (hidden, hidden) for part in ("query", "key", "value", "projection")}
        sparse = p in config.sparse_prefixes
        if not sparse or config.sparse.shared_expert:
            kind = "shared_expert" if sparse else "feed_forward"
            network_shapes = shapes if sparse else matrices_of(config.network)
            matrices |= {f"{p}.{kind}.{part}": shape for part, shape in network_shapes.items()}
        if sparse and config.router_spec.learned:
            tensors[f"{p}.router.weight"] = normal((hidden, groups.total), 1.0)
        for name, shape in matrices.items():
            tensors[f"{name}.weight"] = normal(shape, shape[0] ** -0.5)
            if config.biases:
                tensors[f"{name}.bias"] = normal(shape[1:], 0.2)
        for d, size in zip(groups.names, groups.sizes, strict=True) if sparse else ():
            for part, shape in shapes.items():
                tensors[f"domains.{d}.{p}.experts.{part}.weight"] = normal((size, *shape), shape[0] ** -0.5)
                if config.biases:
                    tensors[f"domains.{d}.{p}.experts.{part}.bias"] = normal((size, shape[1]), 0.2)
            if not config.router_spec.learned:
                tensors[f"domains.{d}.{p}.routing"] = draw.integers(0, size, vocab).astype(np.int32)
    return tensors


class Step(nn.Cell):
    """Objective and gradients, as a training step computes them."""

    def __init__(self, loss: ForwardPass, inputs: GraphInputs) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        parameters = ParameterTuple(loss.trainable_params())
        self.gradient = ops.value_and_grad(loss, inputs.differentiated or None, parameters, has_aux=True)

    def construct(self, *inputs):
        return self.gradient(*inputs)


class DrivenModel:
    """One built model with given tensors. `blocks` is the number of row blocks of an evaluation graph; None gives one
    slot per expert, as training has."""

    def __init__(
        self, config: ModelConfig, groups: ExpertGroups, tensors: Mapping[str, np.ndarray], vocab: int, batch: int,
        length: int, *, blocks: int | None = None, jitter: bool = False, compute: ms.dtype = ms.float32,
        kernels: str | None = None,
    ) -> None:  # fmt: skip
        self.config, self.groups, self.tensors, self.vocab = config, groups, tensors, vocab
        self.blocks, self.shape = blocks, (batch, length)
        self.learned = config.router_spec.learned
        layout = Layout(kernels=kernels)
        factor = config.sparse.capacity_factor if config.sparse.dispatch == "capacity" else None
        self.routers = []
        for index, prefix in enumerate(config.sparse_prefixes):
            tables = None
            if not self.learned:
                tables = {d: tensors[f"domains.{d}.{prefix}.routing"] for d in groups.names}
            options = RouterOptions(
                config.router_spec, groups, config.hidden, length, layout, index, 7, config.choices_of(groups.total),
                capacity_factor=factor, settings=config.router_options, log_weights=config.is_competitive_mixture,
                tables=tables,
            )  # fmt: skip
            self.routers.append(build_router(options))
        slots = groups.total if blocks is None else blocks
        has_own = config.domain_parameters.embedding == "own"
        word_tables = ((len(groups.names), vocab, config.hidden),) if has_own else ()
        self.inputs = GraphInputs(
            tuple(
                LayerInputs(
                    p, slots, config.expert_network, not self.learned,
                    router.noise_shape(batch * length) if jitter else (), bool(kernels),
                )  # fmt: skip
                for p, router in zip(config.sparse_prefixes, self.routers, strict=True)
            ),
            word_tables, batch, length, config.hidden, config.ffn,
        )  # fmt: skip
        self.net = PanGuSigma(config, vocab, self.routers, layout, compute)
        shared = {name for name in tensors if not name.startswith("domains.")}
        assert {p.name for p in self.net.get_parameters()} == shared
        for parameter in self.net.get_parameters():
            assert parameter.shape == tensors[parameter.name].shape, parameter.name
            parameter.set_data(Tensor(tensors[parameter.name]))
        self.loss = ForwardPass(self.net, self.inputs, WeightedLoss(self.net.head, layout))
        self.step = Step(self.loss, self.inputs)
        self.logits_cell = ForwardPass(self.net, self.inputs, Logits(self.net.head))
        for graph in (self.step, self.logits_cell):
            graph.set_inputs(*self.inputs.placeholders())

    def owner(self, expert: int) -> tuple[str, int]:
        """Domain and index inside the group of a position on the expert axis."""
        domain = int(np.searchsorted(np.cumsum(self.groups.sizes), expert, side="right"))
        return self.groups.names[domain], expert - int(self.groups.offsets[domain])

    def flat(
        self, batch: Batch, training: bool, step: int = 0, noise: Mapping[str, np.ndarray] | None = None
    ) -> tuple[list[Tensor], list[tuple[np.ndarray, np.ndarray | None]]]:
        """The graph's variable inputs, and for every sparse layer the expert and the rows of each slot."""
        flat, slots = [], []
        if self.inputs.word_tables:
            flat.append(Tensor(np.stack([self.tensors[f"domains.{d}.embedding.word"] for d in self.groups.names])))
        for router, layer_inputs in zip(self.routers, self.inputs.layers, strict=True):
            experts, rows = np.arange(self.groups.total), None
            if not self.learned:
                ids = router.assign(batch.tokens, batch.domain, step, batch.samples, training)
                if self.blocks is None:
                    plan = plan_by_expert(ids, experts)
                else:
                    make_plan = plan_present if layer_inputs.compiled else plan_in_blocks
                    plan = make_plan(ids, self.blocks)
                experts, rows = plan.experts, plan.counts
                parts = (plan.order, plan.offsets) if layer_inputs.compiled else (*plan.rows, plan.position)
                flat += [Tensor(part) for part in parts]
            elif layer_inputs.noise:
                flat.append(Tensor(noise[layer_inputs.name]))
            for domain, index in map(self.owner, experts):
                prefix = f"domains.{domain}.{layer_inputs.name}.experts"
                flat += [Tensor(self.tensors[f"{prefix}.{n}"][index]) for n in layer_inputs.network.tensors]
            slots.append((experts, rows))
        return flat, slots

    def fixed(self, batch: Batch, keys: Sequence[int] | None = None, scale: float = 1.0) -> list[Tensor]:
        """The fixed inputs: tokens, labels, weights, weight of the auxiliary loss, positions, documents, domains and
        dropout keys."""
        positions, documents = pangu_numpy.document_starts(batch.tokens, EOD)
        keys = np.zeros(len(batch.domain)) if keys is None else np.asarray(keys)
        others = [Tensor(np.ascontiguousarray(a, np.int32)) for a in (positions, documents, batch.domain, keys)]
        return [Tensor(batch.tokens), Tensor(batch.labels), Tensor(batch.weights), Tensor(scale, ms.float32), *others]

    def logits(self, batch: Batch, noise: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Evaluation logits [B,S,V]."""
        self.logits_cell.set_train(False)
        flat, _ = self.flat(batch, False, noise=noise)
        return self.logits_cell(*self.fixed(batch), *flat).asnumpy()

    def train(
        self, batch: Batch, step: int = 0, keys: Sequence[int] | None = None, scale: float = 1.0,
        noise: Mapping[str, np.ndarray] | None = None,
    ):  # fmt: skip
        """(objective, loss sums [B], auxiliary loss, rows per expert of each layer, gradients by tensor name)."""
        self.step.set_train()
        flat, slots = self.flat(batch, True, step, noise)
        values, gradients = self.step(*self.fixed(batch, keys, scale), *flat)
        of_inputs, of_parameters = gradients if self.inputs.differentiated else ((), gradients)
        named = {p.name: g.asnumpy() for p, g in zip(self.loss.trainable_params(), of_parameters, strict=True)}
        of_inputs = [g.asnumpy() for g in of_inputs]
        if self.inputs.word_tables:
            table = of_inputs.pop(0)
            named |= {f"domains.{d}.embedding.word": table[i] for i, d in enumerate(self.groups.names)}
        objective, by_sample, auxiliary, counts = values
        counts = [c.asnumpy() for c in counts]
        for layer, (layer_inputs, (experts, rows)) in enumerate(zip(self.inputs.layers, slots, strict=True)):
            received = counts[layer].sum(axis=0)[:-1] if rows is None else rows
            for (domain, index), some in zip(map(self.owner, experts), received, strict=True):
                for tensor in layer_inputs.network.tensors:
                    name = f"domains.{domain}.{layer_inputs.name}.experts.{tensor}"
                    group_gradient = named.setdefault(name, np.zeros(self.tensors[name].shape, np.float32))
                    gradient = of_inputs.pop(0)
                    if some > 0:  # without rows it is undefined, and nobody may look at it
                        group_gradient[index] += gradient
        return float(objective.asnumpy()), by_sample.asnumpy(), float(auxiliary.asnumpy()), counts, named

    def oracle(
        self, batch: Batch, training: bool = False, noise: Mapping[str, np.ndarray] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> pangu_numpy.Result:  # fmt: skip
        """The NumPy reference's answer to the same batch."""
        config = self.config
        capacity = config.sparse.capacity_factor if training and config.sparse.dispatch == "capacity" else None
        options = pangu_numpy.Options(
            config.layers, config.heads, EOD, tuple(zip(self.groups.names, self.groups.sizes, strict=True)),
            config.sparse_prefixes, config.router, config.activation, config.query_layer == "next_position",
            config.domain_parameters.embedding == "own", capacity, config.sparse.aux_loss_weight, config.norm_epsilon,
            config.choices_of(self.groups.total), config.sparse.z_loss_weight, config.sparse.renormalise,
            config.sparse.balance == "pooled", config.rope_theta, config.is_competitive_mixture,
        )  # fmt: skip
        domains = [self.groups.names[d] for d in batch.domain]
        return pangu_numpy.forward(options, tensors or self.tensors, batch.tokens, batch.labels, domains, noise)

    def oracle_objective(
        self, batch: Batch, tensors: Mapping[str, np.ndarray], noise: Mapping[str, np.ndarray] | None = None,
        scale: float = 1.0,
    ) -> float:  # fmt: skip
        """The training objective by the reference."""
        result = self.oracle(batch, True, noise, tensors)
        return float((batch.weights.astype(np.float64) * result.losses).sum() + scale * result.auxiliary)
