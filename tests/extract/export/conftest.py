"""Models of every kind as checkpoints on disk, with weights large enough that every part of the function shows."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("GLOG_v", "4")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# transformers copies a model's own code there; read when it is imported.
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import Checkpoint, CheckpointContents, Fingerprints, open_checkpoint, save_checkpoint
from pangu_sigma.config import Config, config_from_dict, effective
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_training import train_tokenizer
from rre.routers import ExpertGroups
from tests.oracles import pangu_numpy
from tests.pangu_sigma.model.model_driver import make_tensors
from tests.text_domain import text_domain

LENGTH = 24
GROUPS = ExpertGroups(("code", "poems"), (3, 2))
ONE = ExpertGroups(("code",), (2,))
SPARSE_QUERY = {"layers": 2, "include_query_layer": True}
SIZES = {"layers": 3, "hidden": 16, "heads": 2, "ffn": 24, "positions": LENGTH}
# name -> (domains, what differs in the configuration)
CASES = {
    "dense": (ONE, {"layers": 2}),
    "sub_model": (ONE, {"sparse": SPARSE_QUERY}),
    "full_model": (GROUPS, {"sparse": {"layers": 1}, "domain_parameters": {"embedding": "own"}}),
    "no_query_layer": (GROUPS, {"query_layer": "none", "activation": "gelu", "sparse": {"layers": 2}}),
    "switch": (GROUPS, {"sparse": SPARSE_QUERY | {"router": "switch"}}),
}
# What no format can express yet.
REFUSED = {
    "olmoe": (GROUPS, {"sparse": {"layers": 1, "router": "olmoe", "top_k": 2}}),
    "shared_expert": (GROUPS, {"sparse": {"layers": 1, "shared_expert": True}}),
}
TEXTS = (
    "def main(argument):\n\tif argument is None:\n        return  [1, 22, 333]\n\n\nclass Empty:\n    pass\n",
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n",
    "  two  spaces, a sign ▁ of SentencePiece, <eod> and <pad> as letters, 🙂 and ﬁ, the end ",
    "",
    "<eod>",
    "春眠不觉晓<pad>处处闻啼鸟",
)


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk, and what it was made from."""

    path: Path
    config: Config
    tensors: dict[str, np.ndarray]
    tokenizer: Tokenizer
    groups: ExpertGroups

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.path)

    def logits(self, tokens: np.ndarray, domains: list[str]) -> np.ndarray:
        """The NumPy reference's logits [B, S, V]."""
        model = self.config.model
        options = pangu_numpy.Options(
            model.layers, model.heads, self.tokenizer.eod_id,
            tuple(zip(self.groups.names, self.groups.sizes, strict=True)), model.sparse_prefixes, model.sparse.router,
            model.activation, model.query_layer == "next_position", model.domain_parameters.embedding == "own",
            epsilon=model.norm_epsilon,
        )  # fmt: skip
        return pangu_numpy.forward(options, self.tensors, tokens, tokens, domains).logits


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A trained one, with byte fallback."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n".join(TEXTS[:2]) * 20, encoding="utf-8")
    return train_tokenizer([text_domain("text", [folder / "text.txt"])], 352)


def save_model(
    folder: Path, config: Config, tensors: dict[str, np.ndarray], tokenizer: Tokenizer, groups: ExpertGroups
) -> Path:
    """A checkpoint of these tensors in the run `folder`."""
    tokenizer.save(folder / "tokenizer")
    files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    layer_names = config.model.sparse_prefixes
    contents = CheckpointContents(
        step=7, domains=groups.names,
        coverage={layer_name: dict(zip(groups.names, groups.sizes, strict=True)) for layer_name in layer_names},
        config_text=config.to_yaml(), tokenizer_files=files, probe={}, state={},
        fingerprints=Fingerprints(tokenizer=tokenizer.fingerprint, corpora={}),
    )  # fmt: skip
    return save_checkpoint(folder, contents, tensors, keep=1).path


def make_config(tokenizer: Tokenizer, groups: ExpertGroups, changes: dict) -> Config:
    values = {
        "schema_version": 2,
        "run": {"dir": "unused"},
        "model": {**SIZES, **changes, "vocab_size": tokenizer.vocab_size},
        "domains": [
            {"name": name, "data": ["unused.txt"], "experts": size}
            for name, size in zip(groups.names, groups.sizes, strict=True)
        ],
        "data": {"sequence_length": LENGTH, "tokenizer": {"kind": "sentencepiece", "path": "unused"}},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 1, "batch_size": 1},
    }
    return effective(config_from_dict(values))


@pytest.fixture(scope="session")
def stored(tokenizer, tmp_path_factory) -> Callable[[str], Stored]:
    """Case name -> its checkpoint."""
    made: dict[str, Stored] = {}

    def get(case: str) -> Stored:
        if case not in made:
            groups, changes = (CASES | REFUSED)[case]
            config = make_config(tokenizer, groups, changes)
            tensors = make_tensors(config.model, tokenizer.vocab_size, groups)
            path = save_model(tmp_path_factory.mktemp(case), config, tensors, tokenizer, groups)
            made[case] = Stored(path, config, tensors, tokenizer, groups)
        return made[case]

    return get


def some_tokens(stored: Stored, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens int32 [batch, length] in several documents a row."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, stored.tokenizer.vocab_size, (batch, length))
    tokens[draw.random(tokens.shape) < 0.12] = stored.tokenizer.eod_id
    tokens[:, -2] = stored.tokenizer.eod_id
    return tokens.astype(np.int32)


def domains_of(stored: Stored, batch: int) -> list[str]:
    """A domain for each sample, in turns."""
    names = stored.groups.names
    return [names[b % len(names)] for b in range(batch)]
