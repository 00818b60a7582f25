"""The diagonal Fisher information of the shared parameters, estimated on text of the old domains.

F_i = mean over tokens of E_y [(d log p(y | text before) / d theta_i)^2], y drawn from the model itself (not the text's
own next token, whose squared gradient is another matrix: Kunstner et al. 2019, arXiv 1905.12558). Because the labels
are drawn independently, the gradients of different tokens have mean zero and no covariance, so the square of one
batch's summed gradient, divided by its tokens, already has F_i as its mean: a batch costs one gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from pangu_sigma.model.forward_pass import ForwardPass, WeightedLoss
from pangu_sigma.model.model import Model
from pangu_sigma.model.scoring import Scorer
from rre.counted_random import key64, uniform


class SharedGradient(nn.Cell):
    """Gradients of a batch's summed loss with respect to the shared parameters; the forward pass is evaluation's."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(auto_prefix=False)
        net = scorer.model.net
        self.loss = ForwardPass(net, scorer.inputs, WeightedLoss(net.head, scorer.model.layout))
        self.value_and_grad = ops.value_and_grad(self.loss, None, ParameterTuple(net.trainable_params()), has_aux=True)
        self.set_train(False)
        self.set_inputs(*scorer.inputs.placeholders())

    def construct(self, *inputs: Tensor):
        _, gradients = self.value_and_grad(*inputs)
        return gradients


def estimate_fisher(
    model: Model, batches: Iterable[tuple[str, np.ndarray]], seed: int, rows: int
) -> dict[str, np.ndarray]:
    """Diagonal Fisher information by parameter name, float32 of its shape, from batches of (domain, ids [rows, S + 1]).

    Processes that share the model are given the same batches, compute a part of the rows each and sum the gradients.
    """
    scorer = Scorer(model, rows)
    gradient = SharedGradient(scorer)
    names = [p.name for p in model.net.trainable_params()]
    total = {p.name: np.zeros(p.shape, np.float64) for p in model.net.trainable_params()}
    tokens = 0
    own_rows = scorer.planner.reads[scorer.planner.own]
    for index, (domain, sequences) in enumerate(batches):
        domain_ids = np.full(rows, model.groups.names.index(domain), np.int32)
        logits = scorer.logits(sequences, domain_ids).asnumpy()
        labels = draw_labels(logits, key64(seed, "Fisher labels", index), own_rows)
        planned = replace(scorer.plan(sequences, domain_ids), labels=labels)
        gradients = gradient.set_train(False)(*scorer.pack(planned))
        for name, tensor in zip(names, gradients, strict=True):
            total[name] += np.square(model.processes.sum_float32(tensor.asnumpy()), dtype=np.float64)
        tokens += rows * scorer.length
    return {name: (values / max(1, tokens)).astype(np.float32) for name, values in total.items()}


def draw_labels(logits: np.ndarray, key: int, rows: np.ndarray) -> np.ndarray:
    """One label for each row of logits [B, S, V], drawn from its softmax by the counted stream `key`: int32 [B, S].

    rows [B]: their indices in the whole batch, so that a process draws for its rows what one alone would.
    """
    batch, length, vocab = logits.shape
    points = uniform(key, (rows[:, None] * length + np.arange(length)).reshape(-1)).reshape(batch, length)
    labels = np.empty((batch, length), np.int32)
    for b in range(batch):
        powers = np.exp(logits[b].astype(np.float64) - logits[b].max(-1, keepdims=True))
        edges = np.cumsum(powers, -1)
        labels[b] = (edges <= (points[b] * edges[:, -1])[:, None]).sum(-1)
    return np.minimum(labels, vocab - 1)
