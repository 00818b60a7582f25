"""What a run learns from, what its steps minimise, and what measures it: the domains' text, unless a job brings its
own recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pangu_sigma.data.corpus import Corpus, prepare_corpus
from pangu_sigma.data.mixture_sampler import MixtureSampler
from pangu_sigma.data.packed_sequences import HeldoutSequences, first_sequences
from pangu_sigma.monitor.progress import progress
from pangu_sigma.train.schedule import phase_at
from pangu_sigma.train.startup.starting_point import Beginning
from pangu_sigma.trained_model import stored_tokenizer

if TYPE_CHECKING:
    from pangu_sigma.evaluation.domain_evaluation import Evaluator
    from pangu_sigma.model.model import Model
    from pangu_sigma.train.objective import Objective


class Recipe(Protocol):
    """Made of a run's `Beginning` before the framework is loaded, so that what is wrong with files shows at once."""

    corpus: Corpus
    heldout: Mapping[str, HeldoutSequences]

    def objective(self) -> Objective:
        """What the steps minimise."""

    def evaluator(self, model: Model, objective: Objective) -> Evaluator:
        """What measures held-out text while training."""

    def sampler(self, sizes: Sequence[int]) -> MixtureSampler:
        """What the steps' batches are drawn from; `sizes`: experts of every group."""

    def probe(self, count: int) -> dict[str, np.ndarray]:
        """At most `count` held-out sequences of every domain, int32 [n, S + 1]: with them a checkpoint's model can be
        verified alone."""

    def state(self) -> dict[str, object]:
        """What a checkpoint's state keeps beside what every run has."""


class TextRecipe:
    """The domains' text, tokenised with a checkpoint's tokenizer or the configured one; the mean loss of its tokens."""

    def __init__(self, beginning: Beginning) -> None:
        self.config = beginning.config
        tokenizer = None if beginning.tokenizer_of is None else stored_tokenizer(beginning.tokenizer_of)
        with ExitStack() as jobs:
            running: dict[tuple[str, str], object] = {}

            def advance(domain: str, stage: str, done: int, total: int) -> None:
                key = (domain, stage)
                if key not in running:
                    jobs.close()
                    running.clear()
                    running[key] = jobs.enter_context(progress(f"{stage} {domain}", total or None, unit="documents"))
                running[key].set(done)

            self.corpus = prepare_corpus(self.config, tokenizer, progress=advance)
        self.heldout = self.corpus.heldout()

    def objective(self) -> Objective:
        """See `Recipe`."""
        from pangu_sigma.train.objective import Objective

        return Objective()

    def evaluator(self, model: Model, objective: Objective) -> Evaluator:
        """See `Recipe`."""
        from pangu_sigma.evaluation.domain_evaluation import Evaluator
        from pangu_sigma.train.distributed.mesh_evaluation import MeshEvaluator

        if self.config.cut_over_devices:
            return MeshEvaluator(model, self.config.evaluate.batch_size)
        return Evaluator(model, self.config.evaluate.batch_size)

    def sampler(self, sizes: Sequence[int]) -> MixtureSampler:
        """See `Recipe`; where the run is placed, every placement group reads its own domains' text."""
        config = self.config
        placed = config.parallel.placement_groups > 1
        return MixtureSampler(
            self.corpus.training_streams(),
            lambda step: phase_at(config, step).weights,
            config.run.seed,
            config.data.max_domains_per_batch,
            config.parallel.mesh.domains_of_groups(sizes) if placed else (),
            config.train.gradient_accumulation_steps,
        )

    def probe(self, count: int) -> dict[str, np.ndarray]:
        """See `Recipe`."""
        return first_sequences(self.heldout, count)

    def state(self) -> dict[str, object]:
        """See `Recipe`."""
        return {}
