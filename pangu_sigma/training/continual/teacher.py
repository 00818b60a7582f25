"""Frozen teacher beside the model that trains: its outputs on a step's batch enter the step's objective.

The previous model of a regularised phase, or the reference model of DPO.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mindspore import Tensor

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.config import Config
from pangu_sigma.errors import UserError
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.model.scoring import Scorer
from pangu_sigma.trained_model import trained_from


class Teacher:
    """A frozen `model` that scores planned batches of `rows` samples of the run `config`.

    It plans them anew for itself and computes as evaluation does: no dropout, routing by its own tables, nothing
    dropped.

    stand_in: domain of the run -> domain of the teacher whose experts read its text, where the teacher has none of that
    name. Raises UserError unless it reads the run's vocabulary and every domain.
    """

    def __init__(self, model: Model, config: Config, rows: int, stand_in: Mapping[str, str] | None = None) -> None:
        self.model = model
        if model.vocab != config.model.vocab_size:
            raise UserError(
                f"the reference model has a vocabulary of {model.vocab} ids and the run one of "
                f"{config.model.vocab_size}: they must have the same tokenizer"
            )
        if model.config.data.sequence_length != config.data.sequence_length:
            raise ValueError("the reference must be built with the run's sequence length")
        names = model.groups.names
        teacher_names = [(stand_in or {}).get(name, name) for name in config.domain_names]
        if missing := sorted(set(teacher_names) - set(names)):
            raise UserError(f"the reference model has no domain {missing[0]}: its domains are {', '.join(names)}")
        self.domain = np.array([names.index(name) for name in teacher_names], np.int32)
        self.scorer = Scorer(model, rows, domains=min(rows, len(names)))

    def token_losses(self, batch: RoutedBatch) -> np.ndarray:
        """-log p of every label of the batch: float32 [B, S], in nats."""
        return self.scorer.losses(batch.sequences, self.domain[batch.domain])

    def logits(self, batch: RoutedBatch) -> Tensor:
        """The teacher's logits at every position of the batch: float32 [B, S, V]."""
        return self.scorer.logits(batch.sequences, self.domain[batch.domain])


def load_teacher(
    checkpoint: Checkpoint, config: Config, rows: int, stand_in: Mapping[str, str] | None = None
) -> Teacher:
    """The teacher that a checkpoint holds, for the run `config`, whose device, precision and sequence length it takes.

    Raises UserError where it does not fit the run (see `Teacher`) or has too few positions.
    """
    trained = trained_from(
        checkpoint, config.run.device, config.train.precision, sequence_length=config.data.sequence_length
    )
    return Teacher(trained.model, config, rows, stand_in)
