"""What both systems of the speed comparison compute: configuration, batches of real text, routing tables.

Text comes from the four built-in corpora, tokenised with a vocabulary trained on them. Everything is a file in one
folder: the product reads its YAML and draws the batches through its own sampler; PyTorch gets the same batches and the
same routing tables as arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.config.load_config import effective
from pangu_sigma.data.builtin_corpora import build
from pangu_sigma.data.corpus import Corpus, prepare_corpus
from pangu_sigma.data.mixture_sampler import MixtureSampler
from rre.routing_tables import draw_table

VOCABULARY, LENGTH, BATCH = 8192, 512, 4
LAYERS, HIDDEN, HEADS, FFN, SPARSE_LAYERS = 8, 512, 8, 2048, 4
EXPERTS_PER_DOMAIN = 4


@dataclass(frozen=True)
class Variant:
    """One architecture of the comparison; `domains` 1 takes all text as one domain, else every corpus is one."""

    name: str
    title: str
    sparse_layers: int
    domains: int

    @property
    def experts(self) -> int:
        """Experts of a sparse layer, all domains together; 0 where no layer is sparse."""
        return EXPERTS_PER_DOMAIN * self.domains if self.sparse_layers else 0


VARIANTS = {
    v.name: v
    for v in (
        Variant("dense", "dense", 0, 1),
        Variant("sparse4", "top 4 of 8 layers sparse, 4 experts a layer (1 domain)", SPARSE_LAYERS, 1),
        Variant("sparse16", "top 4 of 8 layers sparse, 16 experts a layer (4 domains × 4)", SPARSE_LAYERS, 4),
    )
}


@dataclass(frozen=True)
class Workload:
    """Files of one variant: the product's configuration, tokens [N, B, S+1], routing (None where dense)."""

    variant: Variant
    config: Path
    tokens: Path
    routing: Path | None


def configuration(variant: Variant, folder: Path, corpora: dict[str, Path]) -> Config:
    """The product's configuration of a variant, with its run folder and token cache inside `folder`."""
    sources = {name: [path] for name, path in corpora.items()}
    if variant.domains == 1:
        sources = {"mixed": list(corpora.values())}
    values = {
        "schema_version": 2,
        "run": {"dir": str(folder), "log_every": 1_000_000, "tensorboard": False},
        "model": {
            "vocab_size": VOCABULARY,
            "layers": LAYERS,
            "hidden": HIDDEN,
            "heads": HEADS,
            "ffn": FFN,
            "positions": LENGTH,
            "sparse": {"layers": variant.sparse_layers},
        },
        "domains": [
            {"name": name, "data": [str(p) for p in paths], "experts": EXPERTS_PER_DOMAIN}
            for name, paths in sources.items()
        ],
        "data": {"tokenizer": {"vocab_size": VOCABULARY}, "sequence_length": LENGTH, "deduplicate": "none"},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"kind": "constant"},
        "train": {"steps": 1_000_000, "batch_size": BATCH},
    }
    return effective(config_from_dict(values))


def sampler(config: Config, corpus: Corpus) -> MixtureSampler:
    """The sampler of a run of `config`; equal configurations draw equal batches."""
    weights = {domain.name: domain.weight for domain in config.domains}
    return MixtureSampler(corpus.training_streams(), weights, config.run.seed)


def prepare(variant: Variant, folder: Path, batches: int) -> Workload:
    """Write the files of `variant` into `folder`: the configuration and the first `batches` batches."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(variant, folder, build(folder.parent / "corpora"))
    corpus = prepare_corpus(config)
    workload = Workload(
        variant,
        folder / "config.yaml",
        folder / "tokens.npy",
        folder / "routing.npz" if variant.sparse_layers else None,
    )
    workload.config.write_text(config.to_yaml(), encoding="utf-8")
    drawn = sampler(config, corpus)
    drawn = [drawn.next_batch(BATCH) for _ in range(batches)]
    np.save(workload.tokens, np.stack([batch.tokens for batch in drawn]))
    if workload.routing is not None:
        domain = np.stack([batch.domain for batch in drawn])
        np.savez(workload.routing, tables=global_tables(config), domain=domain)
    return workload


def global_tables(config: Config) -> np.ndarray:
    """The routing tables that the product draws, int64 [sparse layers, domains, V], experts over all domains."""
    kind, seed = config.model.sparse.table, config.run.seed
    tables = [
        [draw_table(kind, seed, layer_name, d.name, VOCABULARY, d.experts, None) + i * EXPERTS_PER_DOMAIN]
        for layer_name in config.model.sparse_prefixes
        for i, d in enumerate(config.domains)
    ]
    return np.array(tables, np.int64).reshape(len(config.model.sparse_prefixes), len(config.domains), VOCABULARY)
