"""Training task: what a run learns from, what its steps minimise and what evaluates it.

The domains' text here; supervised fine-tuning and DPO bring tasks of their own (`pangu_sigma.finetuning`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.config import Config
from pangu_sigma.data.corpus import Corpus, prepare_corpus
from pangu_sigma.data.mixture_sampler import MixtureSampler
from pangu_sigma.data.packed_rows import HeldoutRows
from pangu_sigma.data.packed_sequences import first_sequences
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.monitor.progress import progress
from pangu_sigma.trained_model import stored_tokenizer
from pangu_sigma.training.schedule import domain_weights
from pangu_sigma.training.startup.starting_point import StartingPoint

if TYPE_CHECKING:
    from pangu_sigma.evaluation.domain_evaluation import Evaluator
    from pangu_sigma.model.model import Model
    from pangu_sigma.training.objective import TrainingObjective


def prepare_with_progress(
    config: Config, tokenizer: Tokenizer | None, known_corpora: Mapping[str, str] = MappingProxyType({})
) -> Corpus:
    """`prepare_corpus` behind progress bars, one at a time: that of the domain and stage under way."""
    with ExitStack() as jobs:
        running: dict[tuple[str, str], object] = {}

        def advance(domain: str, stage: str, done: int, total: int) -> None:
            key = (domain, stage)
            if key not in running:
                jobs.close()
                running.clear()
                running[key] = jobs.enter_context(progress(f"{stage} {domain}", total or None, unit="documents"))
            running[key].set(done)

        return prepare_corpus(config, tokenizer, advance, known_corpora)


class TrainingTask:
    """A kind of training: here language modelling on the domains' text; SFT and DPO change what they do otherwise.

    Made before the framework is loaded, so that what is wrong with files shows at once. The text is tokenised with the
    starting point's tokenizer or the configured one. Raises UserError for the corpus.
    """

    corpus: Corpus
    heldout: Mapping[str, HeldoutRows]

    def __init__(self, starting_point: StartingPoint) -> None:
        self.config = starting_point.config
        checkpoint = starting_point.tokenizer_checkpoint
        tokenizer = None if checkpoint is None else stored_tokenizer(checkpoint)
        self.corpus = prepare_with_progress(self.config, tokenizer, starting_point.known_corpora)
        self.heldout = self.corpus.heldout()

    def objective(self) -> TrainingObjective:
        """What the steps minimise: the mean loss per token."""
        from pangu_sigma.training.objective import TrainingObjective

        return TrainingObjective()

    def evaluator(self, model: Model, objective: TrainingObjective) -> Evaluator:
        """What evaluates held-out text while training."""
        from pangu_sigma.evaluation.domain_evaluation import Evaluator
        from pangu_sigma.training.distributed.mesh_evaluation import MeshEvaluator

        if self.config.sharded_over_devices:
            return MeshEvaluator(model, self.config.evaluate.batch_size)
        return Evaluator(model, self.config.evaluate.batch_size)

    def sampler(self, sizes: Sequence[int]) -> MixtureSampler:
        """What the steps' batches are drawn from; `sizes`: experts of every group. Where the run is placed, every
        placement group reads its own domains' text."""
        config = self.config
        has_placement = config.parallel.placement_groups > 1
        return MixtureSampler(
            self.corpus.training_streams(),
            partial(domain_weights, config),
            config.run.seed,
            config.data.max_domains_per_batch,
            config.parallel.mesh.domains_of_groups(sizes) if has_placement else (),
            config.train.gradient_accumulation_steps,
        )

    def probe(self, count: int) -> dict[str, np.ndarray]:
        """At most `count` held-out sequences of every domain, int32 [n, S + 1]: with them a checkpoint's model can be
        verified alone."""
        return first_sequences(self.heldout, count)

    def state(self) -> dict[str, object]:
        """What a checkpoint's state keeps beside what every run has."""
        return {}
