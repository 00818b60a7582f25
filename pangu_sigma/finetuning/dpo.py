"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): the chosen answer before the rejected one.

With r(y) = beta * (log p(y | x) - log p_ref(y | x)), p the model and p_ref the frozen reference, and log p(y | x) the
sum over the answer's tokens, the loss of a pair is -log sigmoid(r(chosen) - r(rejected)) (equation 7).

Rows come in pairs, the chosen answer's first. Shapes: B rows (B / 2 pairs), S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_sigma.finetuning.example_rows import HeldoutExamples
from pangu_sigma.model.forward_pass import HeadOutput
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.model.routed_batch import RoutedBatch
from pangu_sigma.model.scoring import Scorer
from pangu_sigma.training.continual.teacher import Teacher
from pangu_sigma.training.objective import BatchLoss, TrainingObjective
from parallel.operator_layout import Layout


class PreferenceLoss(HeadOutput):
    """Sum of the pairs' losses; the sums per sample are -log p of the answers.

    Weights [B, S] are 1 where a label counts. Extra inputs: `reference` float32 [B], -log p_ref of every row's answer,
    and `pair_weight`, by which the sum is multiplied.
    """

    is_loss = True

    def __init__(self, head: nn.Cell, layout: Layout, beta: float) -> None:
        super().__init__(head)
        self.sum = layout(ops.ReduceSum(), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.product = layout(ops.MatMul(), (1, 1), (1, 1))
        self.softplus = layout(ops.Softplus(), (1, 1))
        self.difference = Tensor(np.array([[beta], [-beta]], np.float32))

    def construct(self, h, labels: Tensor, domain: Tensor, table: Tensor, weights: Tensor, extra: tuple):
        reference, pair_weight = extra
        by_sample = self.sum(self.mul(self.head(h, labels, domain, table), weights), 1)
        margin = self.product((reference - by_sample).reshape(-1, 2), self.difference)
        return self.sum(self.softplus(-margin)) * pair_weight, by_sample


def rewards(beta: float, by_row: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """r of both answers: float64 [B / 2, 2], from -log p of every row's answer under model and reference [B]."""
    return beta * (reference.astype(np.float64) - by_row.astype(np.float64)).reshape(-1, 2)


def pair_losses(reward: np.ndarray) -> np.ndarray:
    """-log sigmoid(r(chosen) - r(rejected)): float64 [pairs]."""
    return np.logaddexp(0.0, reward[:, 1] - reward[:, 0])


def figures(reward: np.ndarray) -> dict[str, tuple[float, float]]:
    """Sums and counts: how often the chosen answer is before the rejected one, by how much, and both rewards."""
    margin, pairs = reward[:, 0] - reward[:, 1], float(len(reward))
    sums = {
        "preference_accuracy": float((margin > 0).sum()),
        "preference_margin": float(margin.sum()),
        "chosen_reward": float(reward[:, 0].sum()),
        "rejected_reward": float(reward[:, 1].sum()),
    }
    return {name: (value, pairs) for name, value in sums.items()}


class Preference(TrainingObjective):
    """Mean loss per pair against a frozen reference."""

    rows_per_sample = 2

    def __init__(self, beta: float, reference: Callable[[], Teacher], auxiliary: bool = False) -> None:
        super().__init__(auxiliary)
        self.beta = beta
        self._load = reference
        self._reference: Teacher | None = None

    @property
    def reference(self) -> Teacher:
        """The frozen model, loaded when it is first asked for."""
        if self._reference is None:
            self._reference = self._load()
        return self._reference

    def loss(self, head: nn.Cell, layout: Layout) -> HeadOutput:
        return PreferenceLoss(head, layout, self.beta)

    def extra_placeholders(self, inputs: GraphInputs) -> tuple[Tensor, ...]:
        return Tensor(shape=[inputs.batch], dtype=ms.float32), Tensor(shape=[], dtype=ms.float32)

    def units(self, batch: RoutedBatch) -> np.ndarray:
        """A pair counts in its first row."""
        return np.tile([1.0, 0.0], len(batch.tokens) // 2)

    def prepare(self, batch: RoutedBatch) -> np.ndarray:
        """-log p_ref of every row's answer: float32 [B]."""
        losses = self.reference.token_losses(batch)
        return (losses * batch.mask).sum(axis=1, dtype=np.float64).astype(np.float32)

    def inputs(
        self, batch: RoutedBatch, prepared: np.ndarray, scale: float, total: float, micro_batches: int
    ) -> tuple[np.ndarray, float, *tuple[Tensor, ...]]:
        weight = Tensor(scale / total, ms.float32)
        return batch.mask, self.auxiliary_weight(scale, micro_batches), Tensor(prepared), weight

    def measure(self, batch: RoutedBatch, prepared: np.ndarray, by_sample: np.ndarray) -> BatchLoss:
        reward = rewards(self.beta, by_sample, prepared)
        losses = np.zeros(len(by_sample))
        losses[::2] = pair_losses(reward)
        return BatchLoss(losses, self.units(batch), figures(reward))


class PreferenceEvaluator:
    """Measures held-out pairs; `losses` as of `evaluation.domain_evaluation.Evaluator`, in nats per pair."""

    def __init__(self, model: Model, objective: Preference, pairs: int) -> None:
        self.pairs, self.objective = pairs, objective
        self.names = model.groups.names
        self.scorer = Scorer(model, 2 * pairs)
        self.frozen: Scorer | None = None
        self.figures: dict[str, float] = {}

    def batches(self, heldout: HeldoutExamples, limit: int | None) -> int:
        """Number of batches that one domain's pairs take."""
        full_batches = -(-len(heldout) // self.pairs)
        return full_batches if limit is None else min(full_batches, limit)

    def losses(
        self, heldout: Mapping[str, HeldoutExamples], limit: int | None, advance: Callable[[int], None] | None = None
    ) -> tuple[dict[str, float], dict[str, int]]:
        """(loss, tokens of answers) by domain; `figures` then holds the means over all pairs."""
        reference = self.objective.reference
        self.frozen = self.frozen or Scorer(reference.model, 2 * self.pairs)
        losses, counted, sums = {}, {}, {}
        for name, pairs in heldout.items():
            domain = np.full(2 * self.pairs, self.names.index(name), np.int32)
            loss, tokens, seen = 0.0, 0, 0
            for batch_index in range(self.batches(pairs, limit)):
                start = batch_index * self.pairs
                rows, mask = pairs.batch(start, self.pairs)
                there = min(self.pairs, len(pairs) - start)
                log_probabilities = (self.scorer.losses(rows, domain) * mask).sum(axis=1, dtype=np.float64)
                theirs = self.frozen.losses(rows, reference.domain[domain])
                theirs = (theirs * mask).sum(axis=1, dtype=np.float64)
                reward = rewards(self.objective.beta, log_probabilities, theirs)[:there]
                loss += float(pair_losses(reward).sum())
                tokens += int(mask.sum())
                seen += there
                for figure, (value, count) in figures(reward).items():
                    before = sums.get(figure, (0.0, 0.0))
                    sums[figure] = (before[0] + value, before[1] + count)
                if advance:
                    advance(1)
            losses[name], counted[name] = loss / max(1, seen), tokens
        self.figures = {name: value / max(1.0, count) for name, (value, count) in sums.items()}
        return losses, counted
