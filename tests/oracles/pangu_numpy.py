"""PanGu-α and PanGu-Σ's forward pass in NumPy float64, written from the papers and the published code, not from ours.

Block: pre-LN, attention with biases and additive mask -10000, feed-forward with biases. Backbone norm before the query
layer, whose attention queries are rows of a next-position table without norm; no norm after it; logits tied to the word
embedding. Positions restart and attention is cut after every end-of-document token, which belongs to the document it
ends. A sparse layer's token goes to the expert that its domain's routing table names (weight 1), or to the expert of a
Switch gate (weight: its probability, balance loss a * E * sum f_e P_e); a token that finds its expert full gets 0.

Other parts, where the tensors show them (OLMoE, arXiv 2409.02060): a norm without shift is RMSNorm, projected queries
and keys are normalised over their whole width, without position table they are turned by their positions (RoPE in
halves), a network with a gate is SwiGLU (GEGLU where the activation is gelu), matrices have no biases, the head has a
table of its own.

Legend: B samples, S positions, D hidden width, V vocabulary, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tests.oracles import routers_numpy

Array = np.ndarray


@dataclass(frozen=True)
class Options:
    """What the tensors alone do not say. `groups` are (domain, experts) in the order of the layer's expert axis."""

    layers: int
    heads: int
    eod_id: int
    groups: tuple[tuple[str, int], ...] = ()
    sparse: tuple[str, ...] = ()
    router: str = "rre"
    activation: str = "fast_gelu"
    query_layer: bool = True
    per_domain_words: bool = False
    capacity_factor: float | None = None
    auxiliary_weight: float = 0.01
    epsilon: float = 1e-5
    top_k: int = 1
    z_loss_weight: float = 0.0
    renormalise: bool = False
    pooled: bool = False
    rope_theta: float = 10000.0
    competitive: bool = False


@dataclass(frozen=True)
class Result:
    """logits [B,S,V], losses [B,S] in nats, the balance losses' sum, per sparse layer: expert of every token [B,S]
    (-1: dropped)."""

    logits: Array
    losses: Array
    auxiliary: float
    experts: dict[str, Array]


def forward(
    options: Options,
    tensors: Mapping[str, Array],
    tokens: Array,
    labels: Array,
    domains: Sequence[str],
    jitter: Mapping[str, Array] | None = None,
) -> Result:
    """Run the model over `tokens`, `labels` [B,S]; `domains` names each sample's domain; `jitter` [B*S,D] multiplies
    the input of a Switch gate."""
    reference = _Reference(options, {name: np.asarray(a, np.float64) for name, a in tensors.items()})
    logits = reference.logits(tokens, list(domains), jitter or {})
    shifted = logits - logits.max(-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probability, labels[..., None], -1)[..., 0]
    return Result(logits, losses, reference.auxiliary, reference.experts)


def document_starts(tokens: Array, eod_id: int) -> tuple[Array, Array]:
    """Positions and document numbers [B,S], by walking along each row."""
    positions, documents = np.zeros(tokens.shape, int), np.zeros(tokens.shape, int)
    for b, row in enumerate(tokens):
        for s in range(1, len(row)):
            ended = row[s - 1] == eod_id
            positions[b, s] = 0 if ended else positions[b, s - 1] + 1
            documents[b, s] = documents[b, s - 1] + int(ended)
    return positions, documents


def activate(kind: str, x: Array) -> Array:
    """FastGELU x * sigmoid(1.702 x), SiLU x * sigmoid(x), or GELU's tanh form."""
    if kind == "silu":
        return x / (1.0 + np.exp(-x))
    if kind == "fast_gelu":
        return x / (1.0 + np.exp(-1.702 * x))
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Array, gamma: Array, beta: Array, epsilon: float) -> Array:
    """Normalise over the last axis."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * gamma + beta


def rms_norm(x: Array, gamma: Array, epsilon: float) -> Array:
    """Divide by the root mean square of the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gamma


def turned(x: Array, positions: Array, theta: float) -> Array:
    """x [B,H,S,W] as complex numbers (value i, value i + W/2), each multiplied by exp(i position theta^(-2i/W)).

    The angle itself is rounded to float32, as in the models of this form: it is part of their function.
    """
    half = x.shape[-1] // 2
    wavelengths = np.float32(theta ** (np.arange(half) / half))
    angles = (positions[:, None, :, None].astype(np.float32) * (np.float32(1) / wavelengths)).astype(float)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], -1)


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class _Reference:
    def __init__(self, options: Options, tensors: dict[str, Array]) -> None:
        self.options = options
        self.tensors = tensors
        self.auxiliary = 0.0
        self.experts: dict[str, Array] = {}
        self.pooled: list[tuple[Array, Array]] = []

    def logits(self, tokens: Array, domains: list[str], jitter: Mapping[str, Array]) -> Array:
        options, t = self.options, self.tensors
        positions, documents = document_starts(tokens, options.eod_id)
        rotary = "embedding.position" not in t
        names = [f"domains.{d}.embedding.word" if options.per_domain_words else "embedding.word" for d in domains]
        tables = [t[name] for name in names]
        h = np.empty((*tokens.shape, tables[0].shape[1]))
        for b, table in enumerate(tables):
            h[b] = table[tokens[b]] + (0.0 if rotary else t["embedding.position"][positions[b]])
        self.positions = positions if rotary else None
        self.tokens, self.documents, self.domains, self.jitter = tokens, documents, domains, jitter
        for i in range(options.layers - int(options.query_layer)):
            h = self.layer(f"blocks.{i}", h, None)
        h = self.norm("norm", h)
        if options.query_layer:
            h = self.layer("query_layer", h, t["embedding.query"][positions])
        if self.pooled:  # Hugging Face's: means over all layers' tokens, then the product
            share, probability = (np.mean(values, 0) for values in zip(*self.pooled, strict=True))
            self.auxiliary += options.auxiliary_weight * share.size * float((share * probability).sum())
        if "head.word" in t:
            tables = [t["head.word"]] * len(domains)
        if not self.options.competitive:
            return np.stack([h[b] @ table.T for b, table in enumerate(tables)])
        # h [E, B, S, D]: every expert's own distribution of the next token, mixed by its share.
        own = softmax(np.stack([h[:, b] @ table.T for b, table in enumerate(tables)], 1))
        shares = self.shares.reshape(*tokens.shape, -1)
        return np.log(np.einsum("bse,ebsv->bsv", shares, own))

    def norm(self, name: str, x: Array) -> Array:
        if f"{name}.beta" not in self.tensors:
            return rms_norm(x, self.tensors[f"{name}.gamma"], self.options.epsilon)
        return layer_norm(x, self.tensors[f"{name}.gamma"], self.tensors[f"{name}.beta"], self.options.epsilon)

    def affine(self, name: str, x: Array) -> Array:
        return x @ self.tensors[f"{name}.weight"] + self.tensors.get(f"{name}.bias", 0.0)

    def network(self, name: str, x: Array) -> Array:
        """A dense layer's network or a shared expert."""
        names = ("gate.weight", "up.weight", "up.bias", "down.weight", "down.bias")
        return self.feed_forward({n: self.tensors[f"{name}.{n}"] for n in names if f"{name}.{n}" in self.tensors}, x)

    def feed_forward(self, w: Mapping[str, Array], x: Array) -> Array:
        up = x @ w["up.weight"] + w.get("up.bias", 0.0)
        if "gate.weight" in w:
            up = activate(self.options.activation, x @ w["gate.weight"]) * up
        else:
            up = activate(self.options.activation, up)
        return up @ w["down.weight"] + w.get("down.bias", 0.0)

    def layer(self, prefix: str, h: Array, queries: Array | None) -> Array:
        x = self.norm(f"{prefix}.norm1", h)
        h = h + self.attention(f"{prefix}.attention", x if queries is None else queries, x)
        x = self.norm(f"{prefix}.norm2", h)
        if prefix not in self.options.sparse:
            return h + self.network(f"{prefix}.feed_forward", x)
        rows = x.reshape(-1, x.shape[-1])
        by_router = {"switch": self.switch, "olmoe": self.olmoe, "glam": self.glam, "every_expert": self.mixture}
        y = by_router.get(self.options.router, self.random_routed)(prefix, rows)
        if f"{prefix}.shared_expert.up.weight" in self.tensors:
            y = y + self.network(f"{prefix}.shared_expert", rows)
        return h + y.reshape(*y.shape[:-2], *x.shape)

    def attention(self, name: str, queries: Array, x: Array) -> Array:
        batch, length, hidden = x.shape
        heads = self.options.heads
        width = hidden // heads

        def by_head(rows: Array) -> Array:
            return rows.reshape(batch, length, heads, width).transpose(0, 2, 1, 3)

        q, k, v = (self.affine(f"{name}.{p}", rows) for p, rows in (("query", queries), ("key", x), ("value", x)))
        if f"{name}.query_norm.gamma" in self.tensors:
            q, k = self.norm(f"{name}.query_norm", q), self.norm(f"{name}.key_norm", k)
        q, k, v = by_head(q), by_head(k), by_head(v)
        if self.positions is not None:
            q, k = (turned(rows, self.positions, self.options.rope_theta) for rows in (q, k))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width)
        causal = np.tril(np.ones((length, length), bool))
        same_document = self.documents[:, :, None] == self.documents[:, None, :]
        scores = scores + np.where(causal & same_document, 0.0, -10000.0)[:, None]
        y = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, length, hidden)
        return self.affine(f"{name}.projection", y)

    def expert(self, prefix: str, domain: str, number: int, rows: Array) -> Array:
        start = f"domains.{domain}.{prefix}.experts."
        mine = {name.removeprefix(start): a[number] for name, a in self.tensors.items() if name.startswith(start)}
        return self.feed_forward(mine, rows)

    def random_routed(self, prefix: str, rows: Array) -> Array:
        """Domain -> group, vocabulary id -> expert; capacity counts per sample and expert, in token order."""
        sizes = dict(self.options.groups)
        first = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
        batch, length = self.tokens.shape
        chosen = np.full((batch, length), -1)
        y = np.zeros((batch, length, rows.shape[1]))
        x = rows.reshape(batch, length, -1)
        for b, domain in enumerate(self.domains):
            table = self.tensors[f"domains.{domain}.{prefix}.routing"].astype(int)
            room = [length] * sizes[domain]
            if self.options.capacity_factor is not None:
                room = [math.ceil(self.options.capacity_factor * length / sizes[domain])] * sizes[domain]
            mine: dict[int, list[int]] = {}
            for s, token in enumerate(self.tokens[b]):
                number = table[token]
                if room[number] > 0:
                    room[number] -= 1
                    chosen[b, s] = first[domain] + number
                    mine.setdefault(number, []).append(s)
            for number, where in mine.items():
                y[b, where] = self.expert(prefix, domain, number, x[b, where])
        self.experts[prefix] = chosen
        return y.reshape(rows.shape)

    def switch(self, prefix: str, rows: Array) -> Array:
        """The gate sees every expert of every group; capacity counts per sample, in token order."""
        owners = [(domain, number) for domain, size in self.options.groups for number in range(size)]
        gate_input = rows * self.jitter[prefix] if prefix in self.jitter else rows
        probabilities = softmax(gate_input @ self.tensors[f"{prefix}.router.weight"])
        best = probabilities.argmax(-1)
        fractions = np.bincount(best, minlength=len(owners)) / rows.shape[0]
        self.auxiliary += (
            self.options.auxiliary_weight * len(owners) * float((fractions * probabilities.mean(0)).sum())
        )
        length = self.tokens.shape[1]
        room = length
        if self.options.capacity_factor is not None:
            room = math.ceil(self.options.capacity_factor * length / len(owners))
        chosen = np.full(rows.shape[0], -1)
        y = np.zeros_like(rows)
        for e, (domain, number) in enumerate(owners):
            by_sample = best.reshape(self.tokens.shape) == e
            where = np.flatnonzero(by_sample & (by_sample.cumsum(1) <= room))
            chosen[where] = e
            y[where] = probabilities[where, e : e + 1] * self.expert(prefix, domain, number, rows[where])
        self.experts[prefix] = chosen.reshape(self.tokens.shape)
        return y

    def olmoe(self, prefix: str, rows: Array) -> Array:
        """The gate sees every expert of every group and takes k; nothing is dropped."""
        owners = [(domain, number) for domain, size in self.options.groups for number in range(size)]
        options, gate = self.options, self.tensors[f"{prefix}.router.weight"]
        routed = routers_numpy.olmoe(
            rows, gate, options.top_k, options.auxiliary_weight, options.z_loss_weight, options.renormalise
        )
        if options.pooled:
            probabilities = softmax(rows @ gate)
            chosen = np.argsort(-probabilities, 1, kind="stable")[:, : options.top_k]
            hits = np.eye(len(owners))[chosen]  # [T, k, E]
            self.pooled.append((hits.mean(0).sum(0), probabilities.mean(0)))
            self.auxiliary += options.z_loss_weight * (np.log(np.exp(rows @ gate).sum(1)) ** 2).mean()
        else:
            self.auxiliary += routed.auxiliary
        return self.weighed(prefix, rows, routed.weights)

    def glam(self, prefix: str, rows: Array) -> Array:
        """GShard's gate without its draw: the second expert is always used; nothing is dropped."""
        routed = routers_numpy.gshard(rows, self.tensors[f"{prefix}.router.weight"], self.options.auxiliary_weight)
        self.auxiliary += routed.auxiliary
        return self.weighed(prefix, rows, routed.weights)

    def mixture(self, prefix: str, rows: Array) -> Array:
        """Every expert takes every token; [E, T, D] in a competitive mixture, whose outputs stay unmixed."""
        p = softmax(rows @ self.tensors[f"{prefix}.router.weight"])
        if not self.options.competitive:
            return self.weighed(prefix, rows, p)
        self.shares = p
        owners = [(domain, number) for domain, size in self.options.groups for number in range(size)]
        return np.stack([self.expert(prefix, *owner, rows) for owner in owners])

    def weighed(self, prefix: str, rows: Array, weights: Array) -> Array:
        """The sum of all experts' outputs by combine `weights` [T, E]."""
        owners = [(domain, number) for domain, size in self.options.groups for number in range(size)]
        return sum(weights[:, e : e + 1] * self.expert(prefix, *owner, rows) for e, owner in enumerate(owners))
