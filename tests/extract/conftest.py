"""Checkpoints of small models with random weights: everything that training saves, without a training."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import CheckpointContents, Fingerprints, save_checkpoint
from pangu_sigma.config import Config, config_from_dict, tensor_shapes
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from rre.counted_random import generator
from tests.pangu_sigma.altered_checkpoint import alter

SIZES = {"code": 2, "law": 1, "poems": 3}
LENGTH = 16
VOCAB = 384


@functools.cache
def small_tokenizer() -> Tokenizer:
    """A real tokenizer of VOCAB pieces, trained once."""
    from pangu_sigma.data.tokenizers.tokenizer_training import train_tokenizer
    from tests.text_domain import text_domain

    draw = random.Random(0)
    words = ["def", "return", "the", "court", "shall", "party", "moon", "rose", "night", "love", "import", "clause"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text("\n\n".join(" ".join(draw.choices(words, k=200)) for _ in range(20)))
        return train_tokenizer([text_domain("text", [path])], VOCAB)


def small_config(sizes: Mapping[str, int], **model) -> Config:
    """Two layers and a query layer, of which the upper are sparse as `model` says."""
    return config_from_dict(
        {
            "schema_version": 2,
            "run": {"dir": "/nowhere/run"},
            "model": {
                "layers": 3, "hidden": 16, "heads": 2, "ffn": 32, "positions": LENGTH, "vocab_size": VOCAB,
                "sparse": {"layers": 1}, **model,
            },
            "domains": [{"name": n, "data": [f"/nowhere/{n}.jsonl"], "experts": e} for n, e in sizes.items()],
            "data": {
                "sequence_length": LENGTH, "cache": "/nowhere/run/data", "max_domains_per_batch": len(sizes),
                "tokenizer": {"kind": "train", "vocab_size": VOCAB},
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"decay_steps": 8},
            "train": {
                "steps": 8, "batch_size": 4,
                "phases": [{"steps": 4, "weights": {next(iter(sizes)): 1.0}}, {"steps": 4, "domains": list(sizes)}],
            },
        }
    )  # fmt: skip


def random_tensors(config: Config) -> dict[str, np.ndarray]:
    """Weights large enough that every expert matters for the logits, routing tables, and the experts' moments."""
    tensors = {}
    for name, shape in tensor_shapes(config, VOCAB).items():
        draw = generator(0, f"test {name}")
        if name.endswith(".routing"):
            owners = [d for d in config.domains if name.startswith(f"domains.{d.name}.")] or config.domains
            tensors[name] = draw.integers(0, sum(d.experts for d in owners), shape, dtype=np.int32)
        else:
            tensors[name] = draw.standard_normal(shape, np.float32) * np.float32(0.3)
        if ".experts." in name:
            tensors[name.replace(".blocks.", ".optimizer.m.blocks.").replace(
                ".query_layer.", ".optimizer.m.query_layer.")] = np.ones(shape, np.float32)  # fmt: skip
    return tensors


def save_model(run: Path, sizes: Mapping[str, int] = SIZES, *, probes: int = 2, shard: int = 4 << 30, **model) -> Path:
    """Saves step 8 of a run in `run`; returns the checkpoint's folder."""
    config = small_config(sizes, **model)
    tokenizer = small_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    draw = np.random.default_rng(1)
    contents = CheckpointContents(
        step=8,
        domains=list(sizes),
        coverage={layer_name: dict(sizes) for layer_name in config.model.sparse_prefixes},
        config_text=config.to_yaml(),
        tokenizer_files=files,
        probe={name: draw.integers(3, VOCAB, (probes, LENGTH + 1), dtype=np.int32) for name in sizes if probes},
        state={"sampler": {}, "shared_steps": 8},
        fingerprints=Fingerprints(tokenizer=tokenizer.fingerprint, corpora={name: f"{name} text" for name in sizes}),
    )
    return save_checkpoint(run, contents, random_tensors(config), keep=1, max_shard_bytes=shard).path


def flip_byte(folder: Path, tensor: str, index: int = 3) -> None:
    """Changes one byte of a tensor as someone would who also computes every hash anew."""

    def flip(content: bytearray) -> None:
        content[index] ^= 1

    alter(folder, tensor, flip)


@pytest.fixture(scope="session")
def parent(tmp_path_factory) -> Path:
    """A checkpoint of three domains with 2, 1 and 3 experts; treat it as read-only."""
    return save_model(tmp_path_factory.mktemp("parent") / "run")


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """Saves a checkpoint of its own for a test that changes it; see `save_model`."""
    return functools.partial(save_model, tmp_path / "run")
