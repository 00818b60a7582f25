"""PyTorch eager yardstick for training throughput: the same PanGu-α, dense, with table-routed experts or a top-1 gate.

It shares no code with the product and runs in an environment of its own that needs only `torch` and `numpy`. "Best
plain form" means: two threads, fused query/key/value products, `scaled_dot_product_attention`, one fused AdamW, no
copies that can be avoided. `torch.compile` is left out, because the comparison is with eager mode; so are other memory
allocators.

    python benchmarks/torch_pangu.py --variant sparse --experts 16 --form loop          # one JSON line of results
    python benchmarks/torch_pangu.py --variant dense --serve                            # `step N` per line on stdin

    python benchmarks/torch_pangu.py --variant sparse --experts 640 --gate   # Switch's gate, all experts updated

Two simplifications favour PyTorch: attention mask and positions do not restart after an end-of-document token, so that
attention is purely causal and the query layer's queries are projected once per step instead of once per sequence.

Letters in comments: B sequences, S positions, T = B·S rows, D hidden, E experts of a sparse layer (all domains
together), V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """What is built and how it is fed; `layers` counts the query layer, `sparse_layers` the top blocks below it."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    ffn: int = 2048
    vocab: int = 8192
    sequence: int = 512
    batch: int = 4
    sparse_layers: int = 0
    experts: int = 0  # of one sparse layer, all domains together
    domains: int = 1  # divides `experts`; each domain owns a group of equal size unless a routing file says otherwise
    form: str = "loop"  # "loop": one product per hit expert; "bmm": rows padded to the fullest expert, batched product
    # A learned top-1 gate instead of tables; every expert has an update in every step, by zero where no token came.
    gate: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 1234
    threads: int = 2


class FastGelu(torch.autograd.Function):
    """x·sigmoid(1.702·x) = silu(1.702·x)/1.702, elementwise on any shape.

    The gradient is silu's own at 1.702·x, one fused pass; autograd's composition of the formula takes three to five.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scaled = x * 1.702
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


fast_gelu = FastGelu.apply


class FeedForward(nn.Module):
    """[…, D] → […, D]; the feed-forward network of a dense layer, and one expert of the loop form."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden, config.ffn)
        self.down = nn.Linear(config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(fast_gelu(self.up(x)))


class LoopExperts(nn.Module):
    """Experts as separate networks; an expert without rows keeps gradient None: AdamW skips it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """x [T, D], expert [T] int64 → [T, D]."""
        order = expert.argsort()
        counts = expert.bincount(minlength=len(self.experts)).tolist()
        parts = x.index_select(0, order).split(counts)
        done = [network(part) for network, part, n in zip(self.experts, parts, counts, strict=True) if n]
        return torch.empty_like(x).index_copy(0, order, torch.cat(done))


class BmmExperts(nn.Module):
    """Experts as stacked weights; every expert gets as many row slots as the fullest one has rows."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        e, d, f = config.experts, config.hidden, config.ffn
        self.up_weight, self.up_bias = nn.Parameter(torch.empty(e, d, f)), nn.Parameter(torch.zeros(e, 1, f))
        self.down_weight, self.down_bias = nn.Parameter(torch.empty(e, f, d)), nn.Parameter(torch.zeros(e, 1, d))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """x [T, D], expert [T] int64 → [T, D]."""
        e, d = self.up_weight.shape[0], x.shape[1]
        ranked, order = expert.sort()
        counts = expert.bincount(minlength=e)
        slots_each = int(counts.max())
        starts = counts.cumsum(0) - counts
        # A row's slot is its expert's first slot plus its rank among that expert's rows.
        slot_sorted = ranked * slots_each + torch.arange(len(ranked)) - starts[ranked]
        slot = torch.empty_like(order).index_copy_(0, order, slot_sorted)
        rows = x.new_zeros(e * slots_each, d).index_copy(0, slot, x).view(e, slots_each, d)
        hidden = fast_gelu(torch.baddbmm(self.up_bias, rows, self.up_weight))
        return torch.baddbmm(self.down_bias, hidden, self.down_weight).view(-1, d).index_select(0, slot)


class Layer(nn.Module):
    """Pre-LN transformer layer with biases; the query layer takes its queries, not normalised, from a table."""

    def __init__(self, config: Config, sparse: bool, query_layer: bool) -> None:
        super().__init__()
        d = config.hidden
        self.heads, self.query_layer = config.heads, query_layer
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-5), nn.LayerNorm(d, eps=1e-5)
        if query_layer:
            self.query, self.key_value = nn.Linear(d, d), nn.Linear(d, 2 * d)
        else:
            self.query_key_value = nn.Linear(d, 3 * d)
        self.projection = nn.Linear(d, d)
        self.sparse = sparse
        experts = {"loop": LoopExperts, "bmm": BmmExperts}[config.form]
        self.feed_forward = experts(config) if sparse else FeedForward(config)
        self.gate = nn.Linear(d, config.experts, bias=False) if sparse and config.gate else None
        self.balance: Tensor | float = 0.0  # the gate's load-balancing loss of the last step

    def forward(self, h: Tensor, expert: Tensor | None, query_table: Tensor | None) -> Tensor:
        """h [B, S, D], expert [T] for a sparse layer, query_table [S, D] for the query layer → [B, S, D]."""
        b, s, d = h.shape
        x = self.norm1(h)
        if self.query_layer:
            query = self.query(query_table).view(1, s, self.heads, -1).transpose(1, 2).expand(b, -1, -1, -1)
            key, value = self.key_value(x).view(b, s, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            query, key, value = self.query_key_value(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        h = h + self.projection(mixed.transpose(1, 2).reshape(b, s, d))
        x = self.norm2(h)
        if not self.sparse:
            return h + self.feed_forward(x)
        rows = x.view(b * s, d)
        if self.gate is None:
            return h + self.feed_forward(rows, expert).view(b, s, d)
        chances = self.gate(rows).softmax(-1)
        weight, expert = chances.max(-1)
        share = expert.bincount(minlength=chances.shape[1]) / len(expert)
        self.balance = chances.shape[1] * torch.dot(share, chances.mean(0))
        return h + (self.feed_forward(rows, expert) * weight[:, None]).view(b, s, d)


class PanGu(nn.Module):
    """Embedding, `layers` − 1 blocks, the backbone norm, the query layer, tied logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Parameter(torch.empty(config.vocab, config.hidden))
        self.position = nn.Parameter(torch.empty(config.sequence, config.hidden))
        self.query = nn.Parameter(torch.empty(config.sequence, config.hidden))
        blocks = config.layers - 1
        first_sparse = blocks - config.sparse_layers
        self.blocks = nn.ModuleList(Layer(config, i >= first_sparse, query_layer=False) for i in range(blocks))
        self.norm = nn.LayerNorm(config.hidden, eps=1e-5)
        self.query_layer = Layer(config, sparse=False, query_layer=True)
        for name, parameter in self.named_parameters():
            if _is_matrix(name):
                residual = "projection" in name or ".down" in name
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)
            elif "bias" in name:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, labels: Tensor, expert: Tensor | None) -> Tensor:
        """tokens, labels [B, S] int64, expert [sparse layers, T] → mean cross-entropy in nats, a scalar."""
        s = tokens.shape[1]
        h = F.embedding(tokens, self.word) + self.position[:s]
        first_sparse = len(self.blocks) - self.config.sparse_layers
        for i, block in enumerate(self.blocks):
            routed = i >= first_sparse and not self.config.gate
            h = block(h, expert[i - first_sparse] if routed else None, None)
        h = self.query_layer(self.norm(h), None, self.query[:s])
        balance = 0.01 * sum(block.balance for block in self.blocks)
        return F.cross_entropy(F.linear(h.view(-1, h.shape[-1]), self.word), labels.reshape(-1)) + balance


def _is_matrix(name: str) -> bool:
    return "bias" not in name and "norm" not in name


def uniform_tables(config: Config) -> np.ndarray:
    """Random tables [sparse layers, domains, V] of global expert numbers; each expert gets V/(group size) ids, ±1."""
    generator = np.random.default_rng(config.seed)
    group = config.experts // config.domains
    tables = np.empty((config.sparse_layers, config.domains, config.vocab), np.int64)
    for layer in range(config.sparse_layers):
        for domain in range(config.domains):
            tables[layer, domain] = domain * group + generator.permutation(config.vocab) % group
    return tables


def build(config: Config, tables: np.ndarray | None = None) -> Callable[..., float]:
    """Model and optimizer as one callable: step(tokens [B, S+1] int64, domain [B] = zeros) → loss before the update.

    `tables` [sparse layers, domains, V] holds global expert numbers and defaults to `uniform_tables`. The callable's
    `model` attribute is the module.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = PanGu(config)
    matrices = [p for name, p in model.named_parameters() if _is_matrix(name)]
    rest = [p for name, p in model.named_parameters() if not _is_matrix(name)]
    parameters = matrices + rest
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    routing = None
    if config.gate:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    elif config.sparse_layers:
        routing = torch.from_numpy(np.asarray(uniform_tables(config) if tables is None else tables, np.int64))

    def step(tokens: np.ndarray, domain: np.ndarray | None = None) -> float:
        ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))
        inputs, labels = ids[:, :-1], ids[:, 1:]
        expert = None
        if routing is not None:
            owner = torch.zeros(len(ids), dtype=torch.int64) if domain is None else torch.as_tensor(domain).long()
            expert = routing[:, owner[:, None], inputs].flatten(1)
        # Gradients that stay are zero where no token came, so that AdamW updates those experts as well.
        optimizer.zero_grad(set_to_none=not config.gate)
        loss = model(inputs, labels, expert)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    step.model = model
    return step


def zipf_batches(config: Config, count: int) -> np.ndarray:
    """[count, B, S+1] int64 tokens with frequency ∝ 1/(rank + 2.7), ranks shuffled over the vocabulary."""
    generator = np.random.default_rng(config.seed)
    share = 1.0 / (np.arange(config.vocab) + 2.7)
    shape = (count, config.batch, config.sequence + 1)
    return generator.permutation(config.vocab)[generator.choice(config.vocab, shape, p=share / share.sum())]


def _timed(step: Callable[..., float], feed: Iterator[tuple], count: int) -> tuple[list[float], list[float]]:
    seconds, losses = [], []
    for _ in range(count):
        tokens, domain = next(feed)
        start = time.perf_counter()
        losses.append(step(tokens, domain))
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def _serve(step: Callable[..., float], feed: Iterator[tuple], parameters: int) -> None:
    """Answer `step N` lines until the input ends; between requests nothing computes."""
    print(json.dumps({"ready": True, "parameters": parameters}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if len(words) == 2 and words[0] == "step" and words[1].isdigit():
            seconds, losses = _timed(step, feed, int(words[1]))
            print(json.dumps({"seconds": seconds, "losses": losses}), flush=True)
        else:
            print(json.dumps({"error": f"unknown request {line.strip()!r}; send `step N`"}), flush=True)


def _arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Training throughput of a PanGu-α in PyTorch eager, on the CPU.")
    parser.add_argument("--variant", choices=["dense", "sparse"], default="dense")
    parser.add_argument("--form", choices=["loop", "bmm"], default="loop", help="how the experts are computed")
    parser.add_argument("--gate", action="store_true", help="a learned top-1 gate, every expert updated in every step")
    parser.add_argument("--experts", type=int, default=4, help="experts of a sparse layer, all domains together")
    parser.add_argument(
        "--sparse-layers", type=int, default=4, help="top blocks with experts; the query layer stays dense"
    )
    parser.add_argument("--domains", type=int, default=1)
    for name in ("layers", "hidden", "heads", "ffn", "vocab", "batch", "sequence", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Config, name))
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after --warmup untimed ones")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--tokens", metavar="FILE.npy", help="int array [N, B, S+1]; N batches, used in turn")
    parser.add_argument(
        "--routing",
        metavar="FILE.npz",
        help="`tables` [sparse layers, domains, V] of global expert numbers and `domain` [N, B] (may be absent: all 0)",
    )
    parser.add_argument(
        "--serve", action="store_true", help="answer `step N` lines on stdin; --steps and --warmup have no part"
    )
    return parser, parser.parse_args()


def main() -> None:
    parser, given = _arguments()
    sparse = given.variant == "sparse"
    names = ("layers", "hidden", "heads", "ffn", "vocab", "seed", "threads", "form", "gate")
    shape = {name: getattr(given, name) for name in names}
    tokens = np.load(given.tokens, allow_pickle=False) if given.tokens else None
    if tokens is not None and tokens.ndim != 3:
        parser.error(f"--tokens holds an array of shape {tokens.shape}; give one of shape [N, B, S+1].")
    batch, sequence = (given.batch, given.sequence) if tokens is None else (tokens.shape[1], tokens.shape[2] - 1)
    tables = domain = None
    domains = given.domains
    if sparse and not 1 <= given.sparse_layers < given.layers:
        parser.error("--sparse-layers must be at least 1 and below --layers, which counts the query layer.")
    if sparse and given.routing:
        with np.load(given.routing, allow_pickle=False) as stored:
            tables, domain = stored["tables"], stored.get("domain")
        if tables.shape[0] != given.sparse_layers or tables.shape[2] != given.vocab or tables.max() >= given.experts:
            parser.error(
                f"--routing holds tables {tables.shape} up to expert {tables.max()}; "
                "give [--sparse-layers, domains, --vocab] with expert numbers below --experts."
            )
        domains = tables.shape[1]
    elif sparse and given.experts % given.domains:
        parser.error("--domains must divide --experts, or give unequal groups with --routing.")
    counts = {"sparse_layers": given.sparse_layers, "experts": given.experts, "domains": domains} if sparse else {}
    config = Config(batch=batch, sequence=sequence, **shape, **counts)
    tokens = zipf_batches(config, given.warmup + given.steps) if tokens is None else tokens
    if domain is None:
        domain = np.arange(tokens.shape[0] * batch).reshape(-1, batch) % config.domains
    if domain.shape != tokens.shape[:2]:
        parser.error(f"`domain` in --routing has shape {domain.shape}; it must be [N, B] = {tokens.shape[:2]}.")

    def batches() -> Iterator[tuple]:
        while True:
            yield from zip(tokens, domain, strict=True)

    step, feed = build(config, tables), batches()
    parameters = sum(p.numel() for p in step.model.parameters())
    if given.serve:
        return _serve(step, feed, parameters)
    _, first = _timed(step, feed, given.warmup)
    seconds, losses = _timed(step, feed, given.steps)
    result = {
        "tokens_per_second_median": round(batch * sequence / statistics.median(seconds), 1),
        "seconds_per_step": [round(s, 4) for s in seconds],
        "loss_first": (first + losses)[0],
        "loss_last": losses[-1],
        "parameters": parameters,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
