"""Evaluation per domain: held-out loss, a unigram model's beside it, and every domain's text under every expert
group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import numpy as np
from mindspore import Tensor

from pangu_sigma import runtime
from pangu_sigma.checkpoint import resolve
from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.evaluation_result import DomainEvaluation
from pangu_sigma.model.batch_planner import BatchPlanner
from pangu_sigma.model.forward_pass import ForwardPass, WeightedLoss
from pangu_sigma.model.model import Model
from pangu_sigma.trained_model import run_of, stored_corpus, stored_tokenizer, trained_from
from rre.store.disk_store import StoreFull

Advance = Callable[[int], None]


class Evaluator:
    """Evaluator of a model on held-out sequences, one domain's text and one expert group at a time.

    Nothing is dropped, routing follows the tables and rows are cut into fixed blocks, so the figures do not depend on
    what else the model stores. Several processes share every batch and measure together.
    """

    def __init__(self, model: Model, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        # Other measurements than losses, by name; of text there are none.
        self.figures: dict[str, float] = {}
        self.inputs = model.evaluation_inputs(batch_size // model.processes.mesh.rows, domains=1)
        self.planner = BatchPlanner(model, self.inputs, training=False)
        self.graph = ForwardPass(model.net, self.inputs, WeightedLoss(model.net.head, model.layout))
        self.graph.set_train(False)
        self.graph.set_inputs(*self.inputs.placeholders())

    def batches(self, heldout: HeldoutSequences, limit: int | None) -> int:
        """Number of batches that `loss` takes."""
        batches = -(-len(heldout) // self.batch_size)
        return batches if limit is None else min(batches, limit)

    def loss(
        self, heldout: HeldoutSequences, group: str, limit: int | None = None, advance: Advance | None = None
    ) -> tuple[float, int]:
        """(mean loss in nats per token, tokens) of at most `limit` batches under the experts of domain `group`."""
        sums = np.zeros(2)
        for batch in range(self.batches(heldout, limit)):
            start = batch * self.batch_size
            ids, mask = heldout.batch(start, self.batch_size)
            by_sample, _ = self.outputs(ids, mask, group, start)
            local_mask = mask[self.planner.reads][self.planner.own]
            sums += by_sample.asnumpy().astype(np.float64).sum(), local_mask.sum()
            self.model.processes.mark()
            if advance:
                advance(1)
        total, tokens = self.model.processes.total(sums)
        return float(total) / max(int(tokens), 1), int(tokens)

    def outputs(self, ids: np.ndarray, mask: np.ndarray, group: str, first: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Token ids [B, S + 1] and mask [B, S] of the sequences from number `first` on, under the experts of `group` ->
        (loss sums by sample [B], for each sparse layer with a learned gate the counts or assignments of its routing).

        Of several processes each gives its own samples.
        """
        # Dropout belongs to training; the network is shared with the training step, so its mode is set per use.
        self.graph.set_train(False)
        reads = self.planner.reads
        domain = np.full(reads.size, self.model.groups.names.index(group), np.int32)
        planned = self.planner(ids[reads], domain, first + reads, 0, mask[reads])
        try:
            inputs = self.inputs.pack(planned, self.model.store)
        except StoreFull as error:
            raise UserError(f"evaluating {group}: {error}") from error
        _, by_sample, _, counts = self.graph(*inputs)
        return by_sample, counts

    def losses(
        self, heldout: Mapping[str, HeldoutSequences], limit: int | None = None, advance: Advance | None = None
    ) -> tuple[dict[str, float], dict[str, int]]:
        """(loss, tokens) of every domain's text under its own experts."""
        measured = {name: self.loss(sequences, name, limit, advance) for name, sequences in heldout.items()}
        return {n: v[0] for n, v in measured.items()}, {n: v[1] for n, v in measured.items()}

    def matrix(
        self, heldout: Mapping[str, HeldoutSequences], limit: int | None = None, advance: Advance | None = None
    ) -> dict[str, dict[str, float]]:
        """text domain -> group -> loss of that text under that group's experts."""
        return {
            text: {group: self.loss(sequences, group, limit, advance)[0] for group in self.model.groups.names}
            for text, sequences in heldout.items()
        }


def measure_with_progress(
    evaluator: Evaluator,
    heldout: Mapping[str, HeldoutSequences],
    unigram: Mapping[str, float],
    step: int,
    batches: int | None = None,
) -> DomainEvaluation:
    """Measure every domain and group behind a progress bar; `batches` of each text as `EvaluateConfig.batch_limit` has
    them."""
    from pangu_sigma.monitor.progress import progress

    limit = evaluator.model.config.evaluate.batch_limit(batches)
    counts = {name: evaluator.batches(sequences, limit) for name, sequences in heldout.items()}
    in_all = {name: evaluator.batches(sequences, None) for name, sequences in heldout.items()}
    with progress("evaluate", sum(counts.values()) * len(evaluator.model.groups.names), unit="batches") as job:
        matrix = evaluator.matrix(heldout, limit, job.advance)
    losses = {name: matrix[name][name] for name in heldout}
    return DomainEvaluation(
        step=step,
        losses=losses,
        perplexity={name: math.exp(min(loss, 700.0)) for name, loss in losses.items()},
        unigram=dict(unigram),
        matrix=matrix,
        tokens={
            name: min(sequences.tokens, counts[name] * evaluator.batch_size * sequences.sequence_length)
            for name, sequences in heldout.items()
        },
        batches={name: [count, in_all[name]] for name, count in counts.items()},
    )


@runtime.COMPUTING
def measure_checkpoint(path: Path, batches: int | None, workers: int) -> DomainEvaluation | None:
    """`evaluate` in this process, which is one of `workers`; None in all but the first."""
    from pangu_sigma.monitor.result_files import write_json
    from pangu_sigma.workers import processes_of, with_workers_for

    checkpoint = resolve(path)
    config, run_dir = with_workers_for(checkpoint, workers), run_of(checkpoint)
    processes = processes_of(config, run_dir or Path(gettempdir()) / "pangu-sigma")
    with TemporaryDirectory(prefix="pangu-sigma-") as scratch:
        tokenizer = stored_tokenizer(checkpoint)
        if not processes.first:
            # The first one tokenises what is not there yet and connects after that.
            runtime.prepare(config.run.device)
            processes.connect()
        corpus = stored_corpus(checkpoint, config, tokenizer, Path(scratch))
        heldout = corpus.heldout_to_measure()
        if processes.first:
            runtime.prepare(config.run.device)
            processes.connect()
        evaluator = Evaluator(trained_from(checkpoint, processes=processes).model, config.evaluate.batch_size)
        unigram = corpus.unigram_losses(config.evaluate.batch_limit(batches))
        result = measure_with_progress(evaluator, heldout, unigram, checkpoint.step, batches)
    processes.leave()
    if not processes.first:
        return None
    if run_dir is not None:
        write_json(run_dir / "evaluation.json", result.to_dict())
    return result
