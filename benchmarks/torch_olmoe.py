"""OLMoE's training step in PyTorch, on the CPU: Hugging Face's own model, and two plain ones of the same function.

    python benchmarks/torch_olmoe.py --form hf|loop|bmm --sizes SIZES.json --tokens TOKENS.npy   # `step N` per line

`loop`: for each expert that was hit, its rows are taken, computed and added back. `bmm`: rows sorted by expert, padded
to the fullest expert's, three batched products over all experts. Everything else of the plain model is written once:
RMSNorm, rotary positions, normalised queries and keys, `scaled_dot_product_attention`, cross-entropy. The objective is
Hugging Face's in all forms: mean loss plus the pooled load-balancing loss. Clipping at 1.0, fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

AUXILIARY = 0.01


class Plain(nn.Module):
    """The whole model. Legend: B samples, S positions, T = B S rows, D hidden, E experts, F inner width, k choices."""

    def __init__(self, sizes: dict[str, int], form: str) -> None:
        super().__init__()
        vocab, hidden, layers = sizes["vocab_size"], sizes["hidden"], sizes["layers"]
        self.words = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList([Layer(sizes, form) for _ in range(layers)])
        self.norm = nn.RMSNorm(hidden, 1e-5)
        self.head = nn.Linear(hidden, vocab, bias=False)
        width = hidden // sizes["heads"]
        angles = torch.outer(torch.arange(sizes["positions"]), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("angles", torch.cat([angles, angles], 1))
        self.experts, self.chosen = sizes["experts"], sizes["top_k"]
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, pooled load-balancing loss) of ids, labels [B, S]."""
        h = self.words(ids)
        turn = self.angles[: ids.shape[1]].cos(), self.angles[: ids.shape[1]].sin()
        gates = []
        for layer in self.layers:
            h, probabilities = layer(h, turn)
            gates.append(probabilities)
        logits = self.head(self.norm(h)).flatten(0, 1)
        gates = torch.cat(gates)
        hits = F.one_hot(gates.topk(self.chosen).indices, self.experts).float()
        balance = self.experts * (hits.mean(0).sum(0) * gates.mean(0)).sum()
        return F.cross_entropy(logits, labels.flatten()), balance


class Layer(nn.Module):
    """h [B, S, D] -> (h, the gate's probabilities [T, E])."""

    def __init__(self, sizes: dict[str, int], form: str) -> None:
        super().__init__()
        hidden, inner, experts = sizes["hidden"], sizes["ffn"], sizes["experts"]
        self.heads, self.chosen, self.form = sizes["heads"], sizes["top_k"], form
        self.norm1, self.norm2 = nn.RMSNorm(hidden, 1e-5), nn.RMSNorm(hidden, 1e-5)
        self.query_norm, self.key_norm = nn.RMSNorm(hidden, 1e-5), nn.RMSNorm(hidden, 1e-5)
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate, self.up = (nn.Parameter(torch.empty(experts, hidden, inner)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(experts, inner, hidden))

    def forward(self, h: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = h + self.attention(self.norm1(h), turn)
        rows = self.norm2(h).flatten(0, 1)
        probabilities = self.router(rows).float().softmax(-1)
        weights, experts = probabilities.topk(self.chosen)
        compute = self.loop if self.form == "loop" else self.sorted_bmm
        return h + compute(rows, weights, experts).view_as(h), probabilities

    def attention(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        def by_head(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def turned(rows: Tensor) -> Tensor:
            low, high = rows.chunk(2, -1)
            return rows * turn[0] + torch.cat([-high, low], -1) * turn[1]

        q, k = turned(by_head(self.query_norm(self.query(x)))), turned(by_head(self.key_norm(self.key(x))))
        y = F.scaled_dot_product_attention(q, k, by_head(self.value(x)), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def loop(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        y = torch.zeros_like(rows)
        for expert in experts.unique().tolist():
            token, choice = torch.where(experts == expert)
            x = rows[token]
            out = (F.silu(x @ self.gate[expert]) * (x @ self.up[expert])) @ self.down[expert]
            y = y.index_add(0, token, out * weights[token, choice, None])
        return y

    def sorted_bmm(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self.gate))
        first = counts.cumsum(0) - counts
        owner = flat[order]
        longest = int(counts.max())
        slot = owner * longest + torch.arange(len(flat)) - first[owner]
        token = order // self.chosen
        x = rows.new_zeros(len(counts) * longest, rows.shape[1]).index_copy(0, slot, rows[token])
        x = x.view(len(counts), longest, -1)
        out = torch.bmm(F.silu(torch.bmm(x, self.gate)) * torch.bmm(x, self.up), self.down).flatten(0, 1)
        return torch.zeros_like(rows).index_add(0, token, out[slot] * weights.flatten()[order, None])


def build(form: str, sizes: dict[str, int]) -> tuple[nn.Module, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """(the model, ids and labels [B, S] -> (mean loss, pooled load-balancing loss))."""
    torch.manual_seed(0)
    if form != "hf":
        model = Plain(sizes, form)
        return model, model
    from transformers import OlmoeConfig, OlmoeForCausalLM
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden"], intermediate_size=sizes["ffn"],
            num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_experts=sizes["experts"],
            num_experts_per_tok=sizes["top_k"], max_position_embeddings=sizes["positions"], use_cache=False,
            pad_token_id=None, eos_token_id=None, bos_token_id=None,
        )
    )  # fmt: skip

    def forward(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = model(ids, output_router_logits=True)
        balance = load_balancing_loss_func(out.router_logits, sizes["experts"], sizes["top_k"])
        return F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()), balance

    return model, forward


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps of an OLMoE in PyTorch on the CPU, timed.")
    parser.add_argument("--form", choices=["hf", "loop", "bmm"], required=True)
    parser.add_argument("--sizes", required=True, metavar="FILE.json")
    parser.add_argument("--tokens", required=True, metavar="FILE.npy", help="int array [N, B, S + 1], used in turn")
    given = parser.parse_args()
    with open(given.sizes, encoding="utf-8") as file:
        sizes = json.load(file)
    tokens = torch.from_numpy(np.load(given.tokens, allow_pickle=False).astype(np.int64))
    torch.set_num_threads(2)
    model, forward = build(given.form, sizes)
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    done = 0

    def step() -> float:
        nonlocal done
        ids = tokens[done % len(tokens)]
        done += 1
        optimizer.zero_grad(set_to_none=True)
        loss, balance = forward(ids[:, :-1], ids[:, 1:])
        (loss + AUXILIARY * balance).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    print(json.dumps({"ready": True, "parameters": sum(p.numel() for p in parameters)}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if len(words) != 2 or words[0] != "step" or not words[1].isdigit():
            print(json.dumps({"error": f"unknown request {line.strip()!r}; send `step N`"}), flush=True)
            continue
        seconds, losses = [], []
        for _ in range(int(words[1])):
            start = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - start)
        answer = {"seconds": seconds, "losses": losses}
        print(json.dumps(answer if all(map(math.isfinite, losses)) else {"error": "a loss is not finite"}), flush=True)


if __name__ == "__main__":
    main()
