"""The systems of the router comparison: the same data, tokens, seeds and active parameters."""

from __future__ import annotations

from dataclasses import dataclass

DOMAINS = ("code", "math_en", "drama_en", "poetry_zh")
INNER = 768  # active feed-forward width per token in every layer of every system
SHARED = [
    "model.layers=4", "model.hidden=192", "model.heads=4", "model.positions=128", "model.query_layer=none",
    "data.sequence_length=128", "data.tokenizer.vocab_size=4096", "train.batch_size=16", "optimizer.learning_rate=2e-3",
    "run.tensorboard=false", "run.log_every=20", "evaluate.batches=16", "evaluate.batch_size=16", "checkpoint.keep=1",
]  # fmt: skip


@dataclass(frozen=True)
class System:
    """One way to route: its title, its changes, how many experts a domain contributes and how many a token takes.

    Every expert is INNER / k wide, so that each has the same number of active parameters per token; every layer
    is sparse, because an expert is as wide as a dense layer's network.
    """

    title: str
    router: str | None
    experts: int = 4
    top_k: int = 1
    more: tuple[str, ...] = ()

    def changes(self) -> list[str]:
        """Changes of the configuration, beside SHARED and the domains."""
        if self.router is None:
            return ["model.sparse.layers=0", "model.sparse.table=uniform", f"model.ffn={INNER}"]
        overrides = [
            "model.sparse.pattern=every", "model.sparse.layers=0", f"model.sparse.router={self.router}",
            f"model.ffn={INNER // self.top_k}", *self.more,
        ]  # fmt: skip
        return overrides


TABLES = ("model.sparse.table=frequency",)
# Room is counted over the whole batch, as GShard's groups of thousands of tokens have it: gates tell domains apart, and
# a sample's own tokens would crowd into few experts.
CAPACITY = ("model.sparse.table=uniform", "model.sparse.dispatch=capacity", "model.sparse.capacity_factor=1.25",
            "model.sparse.capacity_samples=16")  # fmt: skip
# 16 experts a layer of the full width, or as many parameters cut finer.
SYSTEMS = {
    "dense": System("dense", None),
    "switch": System("Switch (top 1 of 16, capacity 1.25)", "switch", more=CAPACITY),
    "gshard": System("GShard (top 2 of 32 halves, capacity 1.25)", "gshard", 8, 2, more=CAPACITY),
    "hash": System("hash (1 of 16, one table)", "hash", more=TABLES),
    "rre": System("RRE (1 of 4 in the domain's group)", "rre", more=TABLES),
    "olmoe": System("OLMoE-style (top 4 of 64 quarters, dropless)", "olmoe", 16, 4,
                    more=("model.sparse.top_k=4", "model.sparse.table=uniform")),
}  # fmt: skip
