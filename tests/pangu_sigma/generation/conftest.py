"""Small untrained models of every kind with their two decoders, built and compiled once for the tests here."""

from __future__ import annotations

import json
import os

os.environ.setdefault("GLOG_v", "4")

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pangu_sigma import runtime
from pangu_sigma.config import config_from_dict
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_training import train_tokenizer
from pangu_sigma.generation.kv_cache_decoder import KvCacheDecoder
from pangu_sigma.model.build_model import build_model
from pangu_sigma.model.model import Model
from tests.oracles.recomputing_decoder import RecomputingDecoder
from tests.text_domain import text_domain

WINDOW, SLOTS, VOCAB = 32, 4, 336
DOMAINS = {"code": 3, "law": 1, "poems": 2}
# Wide initial weights make logits of several units, so that a wrong one is far off.
SIZES = {"layers": 3, "hidden": 16, "heads": 2, "ffn": 24, "positions": WINDOW, "init_std": 0.3}
CASES = {
    "dense": {},
    # What acts while training only is on too: generation must not see it.
    "rre": {
        "dropout": 0.2, "attention": {"dropout": 0.2},
        "sparse": {"layers": 2, "include_query_layer": True, "resample": True},
    },
    "slots": {
        "query_layer": "none", "activation": "gelu", "domain_parameters": {"embedding": "own"}, "sparse": {"layers": 1},
    },
    "switch": {"sparse": {"layers": 1, "router": "switch", "jitter": 0.1}},
    "olmoe": {"sparse": {"pattern": "every", "router": "olmoe", "top_k": 3, "shared_expert": True}},
    "olmoe_parts": {
        "init_std": 0.2,
        "norm": "rmsnorm", "position": "rope", "feed_forward": "swiglu", "activation": "silu", "biases": False,
        "head": "untied", "query_layer": "none", "attention": {"qk_norm": True},
        "sparse": {"layers": 2, "router": "olmoe", "top_k": 2, "shared_expert": True},
    },
    "rre_swiglu": {
        "norm": "rmsnorm", "position": "rope", "feed_forward": "swiglu", "activation": "silu", "biases": False,
        "query_layer": "none", "sparse": {"layers": 1},
    },
    "mixture": {
        "layers": 2, "top_layer": "mixture", "sparse": {"shared_expert": True},
    },
    "mixture_slots": {
        "layers": 2, "query_layer": "none", "domain_parameters": {"embedding": "own"},
        "top_layer": "mixture",
    },
    "glam": {
        "layers": 2, "query_layer": "none", "feed_forward": "geglu", "activation": "gelu", "biases": False,
        "sparse": {"pattern": "every_other", "router": "glam", "feed_forward": "mlp"},
    },
    "hash": {"sparse": {"layers": 1, "router": "hash", "shared_expert": True}},
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model, its cached decoders (in shared memory, or as on an accelerator) and the one that recomputes."""

    model: Model
    cached: KvCacheDecoder
    on_device: KvCacheDecoder
    plain: RecomputingDecoder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    text = " ".join(f"word{i} naïve façade return import" for i in range(300))
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    return train_tokenizer([text_domain("text", (str(path),))], VOCAB)


@pytest.fixture(scope="session")
def kind(tokenizer) -> Callable[[str], Kind]:
    built: dict[str, Kind] = {}

    def get(case: str) -> Kind:
        if case not in built:
            # One kind lets its caches grow and reads prompts in two blocks; the others spare the compilations.
            built[case] = _build(CASES[case], tokenizer, WINDOW // 2 if case == "rre" else WINDOW)
        return built[case]

    return get


def _build(changes: dict, tokenizer: Tokenizer, shortest_cache: int) -> Kind:
    domains = [{"name": name, "data": [f"{name}.jsonl"], "experts": n} for name, n in DOMAINS.items()]
    config = config_from_dict(
        {
            "schema_version": 2,
            "run": {"dir": "run", "seed": 5},
            "model": SIZES | {"vocab_size": VOCAB} | changes,
            "data": {"sequence_length": WINDOW, "tokenizer": {"kind": "train", "vocab_size": VOCAB}},
            "domains": domains,
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": 1, "batch_size": 1},
        },
        source="the test",
    )
    runtime.prepare("CPU")
    model = build_model(config, VOCAB, tokenizer.eod_id)
    return Kind(
        model,
        KvCacheDecoder(model, SLOTS, shortest_cache, block=shortest_cache),
        KvCacheDecoder(model, SLOTS, shortest_cache, on_device=True, block=shortest_cache),
        RecomputingDecoder(model),
    )
