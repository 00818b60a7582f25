"""A model small enough to compile in seconds, its trainer, and random batches, all within the test's process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pangu_sigma.checkpoint import LazyTensor
from pangu_sigma.config import Config, config_from_dict, effective
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.model.build_model import build_model
from pangu_sigma.model.model import Model
from pangu_sigma.model.state_dict import model_tensors
from pangu_sigma.training.schedule import scheduled_step
from pangu_sigma.training.trainer import NO_REGULARISER, Regulariser, StepResult, Trainer

VOCAB, LENGTH, EOD = 48, 16, 2
EXPERTS = {"code": 2, "law": 1, "poems": 3}


def small_config(model: Mapping | None = None, **sections: Mapping) -> Config:
    """A configuration of one sparse block and a dense query layer; `model` and `sections` change it by key."""
    sparse = {"layers": 1, **(model or {}).get("sparse", {})}
    values = {
        "schema_version": 2,
        "run": {"dir": "unused", **sections.get("run", {})},
        "model": {
            **{"vocab_size": VOCAB, "layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "positions": LENGTH},
            **(model or {}),
            "sparse": sparse,
        },
        "domains": [{"name": name, "data": ["unused.txt"], "experts": n} for name, n in EXPERTS.items()],
        "data": {
            "sequence_length": LENGTH,
            "tokenizer": {"kind": "sentencepiece", "path": "unused"},
            **sections.get("data", {}),
        },
        "optimizer": {"learning_rate": 1e-2, **sections.get("optimizer", {})},
        "schedule": {"kind": "constant", **sections.get("schedule", {})},
        "train": {"steps": 100, "batch_size": 4, **sections.get("train", {})},
        "experts": sections.get("experts", {}),
    }
    return effective(config_from_dict(values))


def small_model(config: Config) -> Model:
    return build_model(config, config.model.vocab_size, EOD)


def small_trainer(model: Mapping | None = None, **sections: Mapping) -> Trainer:
    return Trainer(small_model(small_config(model, **sections)))


def batch(step: int, domains: Sequence[int], ids: Sequence[int] = range(VOCAB)) -> Batch:
    """Random text of `ids` for one sample per entry of `domains`; the same for the same arguments."""
    draw = np.random.default_rng(step)
    size = len(domains)
    tokens = draw.choice(np.asarray(ids), (size, LENGTH + 1)).astype(np.int32)
    return Batch(tokens, np.array(domains, np.int32), step * size + np.arange(size), step)


def step_on(trainer: Trainer, index: int, drawn: Batch, regulariser: Regulariser = NO_REGULARISER) -> StepResult:
    """Optimizer step `index` on a batch."""
    return trainer.step(scheduled_step(trainer.config, index), trainer.plan(drawn), regulariser)


def tensors_now(trainer: Trainer) -> dict[str, np.ndarray]:
    """Copies of every tensor that a checkpoint would hold now."""
    tensors = model_tensors(trainer.model, trainer.optimizer.moments())
    return {name: t.read() if isinstance(t, LazyTensor) else t.copy() for name, t in tensors.items()}


def first_step_gradients(
    trainer: Trainer, drawn: Batch, regulariser: Regulariser = NO_REGULARISER
) -> dict[str, np.ndarray]:
    """Gradients of a trainer's first step by the name of their first moment, which is divided by 1 - beta1."""
    step_on(trainer, 0, drawn, regulariser)
    moments = {name: tensor for name, tensor in tensors_now(trainer).items() if ".m." in name}
    return {name: moment / 0.1 for name, moment in moments.items()}


def changed_names(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> set[str]:
    """Names of tensors that differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}
