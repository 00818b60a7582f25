"""What an adaptation learns from: examples in the place of the domains' text, by sft's loss or dpo's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.checkpoint import Checkpoint, resolve
from pangu_sigma.config import Config
from pangu_sigma.config.config_paths import resolve_stored_path, stored_path
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.finetuning.example_rows import ExampleSampler, ExampleStream, HeldoutExamples, NoExamples
from pangu_sigma.finetuning.examples import ExampleSet, load_examples
from pangu_sigma.monitor.progress import progress
from pangu_sigma.trained_model import stored_tokenizer
from pangu_sigma.training.schedule import phase_index
from pangu_sigma.training.startup.starting_point import StartingPoint
from pangu_sigma.training.task import TrainingTask

if TYPE_CHECKING:
    from pangu_sigma.evaluation.domain_evaluation import Evaluator
    from pangu_sigma.finetuning.dpo import PreferenceEvaluator
    from pangu_sigma.model.model import Model
    from pangu_sigma.training.continual.teacher import Teacher
    from pangu_sigma.training.objective import TrainingObjective

# Key of the trainer state that says which checkpoint is the frozen reference: {"path", "sha256"}.
REFERENCE = "reference"


@dataclass(frozen=True)
class ExampleCorpus:
    """The examples of every domain that has some, in the place of the domains' text.

    fingerprints: of the text that the adapted model learned.
    """

    config: Config
    tokenizer: Tokenizer
    sets: Mapping[str, ExampleSet]
    fingerprints: Mapping[str, str]

    def messages(self) -> list[str]:
        """What became of the examples, domain by domain."""
        return [examples.sentence() for examples in self.sets.values()]

    def warnings(self) -> list[str]:
        """None: no text of a domain is read."""
        return []

    def heldout(self) -> dict[str, HeldoutExamples]:
        """Held-out examples by domain; domains without any are left out."""
        length, pad_id = self.config.data.sequence_length, self.tokenizer.pad_id
        sets = {name: examples for name, examples in self.sets.items() if examples.heldout}
        return {name: HeldoutExamples(examples, length, pad_id) for name, examples in sets.items()}

    def token_counts(self, size: int) -> dict[str, np.ndarray]:
        """None: the adapted model brings its routing tables."""
        return {}

    def unigram_losses(self, batches: int | None) -> dict[str, float]:
        """No unigram model is set beside an adaptation."""
        return {}


class ExampleTask(TrainingTask):
    """Fine-tuning on examples: SFT or DPO. Corpus fingerprints and probes are those of the adapted model.

    `named`: the model that the user named, where a run that resumes may find its reference. Raises UserError.
    """

    def __init__(self, starting_point: StartingPoint, named: Path) -> None:
        self.config = starting_point.config
        # Of a new run the adapted model's checkpoint, of one that resumes its own.
        self.origin = starting_point.tokenizer_checkpoint
        self.frozen = _frozen(starting_point, named) if self.config.adapt.objective == "dpo" else None
        self.corpus = _tokenised(self.config, self.origin)
        self.heldout = self.corpus.heldout()
        # Read now: of a run that resumes, it lies in a checkpoint that the run's own saves delete.
        self._probe = self.origin.probe()

    def objective(self) -> TrainingObjective:
        """See `TrainingTask`."""
        from pangu_sigma.finetuning.dpo import Preference
        from pangu_sigma.training.continual.teacher import load_teacher
        from pangu_sigma.training.objective import TrainingObjective
        from pangu_sigma.training.trainer import micro_batch_rows

        settings = self.config.adapt
        if settings.objective == "sft":
            return TrainingObjective(auxiliary=settings.auxiliary_losses)

        def load() -> Teacher:
            return load_teacher(self.frozen, self.config, micro_batch_rows(self.config, objective))

        objective = Preference(settings.beta, load, settings.auxiliary_losses)
        return objective

    def evaluator(self, model: Model, objective: TrainingObjective) -> Evaluator | PreferenceEvaluator:
        """See `TrainingTask`."""
        from pangu_sigma.finetuning.dpo import Preference, PreferenceEvaluator

        if isinstance(objective, Preference):
            return PreferenceEvaluator(model, objective, self.config.evaluate.batch_size)
        return super().evaluator(model, objective)

    def sampler(self, sizes: Sequence[int]) -> ExampleSampler:
        """See `TrainingTask`; weights are the examples' own where a phase has none."""
        config = self.config
        own = {examples.name: examples.weight for examples in config.adapt.examples}

        def weights(step: int) -> dict[str, float]:
            phases = config.train.phases
            written = phases[phase_index(config, step)].weights if phases else None
            return own if written is None else dict(written)

        sets, length, pad_id = self.corpus.sets, config.data.sequence_length, self.corpus.tokenizer.pad_id
        streams = [
            ExampleStream(sets[name], length, pad_id, config.run.seed) if name in sets else NoExamples(name, length)
            for name in config.domain_names
        ]
        return ExampleSampler(streams, weights, config.run.seed, config.data.max_domains_per_batch)

    def probe(self, count: int) -> dict[str, np.ndarray]:
        """The adapted model's own probe: sequences of its domains' text, cut to this run's length."""
        length = self.config.data.sequence_length + 1
        probe = {name: rows[:count, :length] for name, rows in self._probe.items()}
        return {name: rows for name, rows in probe.items() if rows.shape[0] and rows.shape[1] == length}

    def state(self) -> dict[str, object]:
        """See `TrainingTask`; dpo's reference by its path from the run's folder, and its hash."""
        if self.frozen is None:
            return {}
        path = stored_path(str(self.frozen.path), self.config.run.dir)
        return {REFERENCE: {"path": path, "sha256": self.frozen.sha256}}


def _tokenised(config: Config, origin: Checkpoint) -> ExampleCorpus:
    tokenizer = stored_tokenizer(origin)
    sets = {}
    for examples in config.adapt.examples:
        with progress(f"tokenise {examples.name}", None, unit="examples") as job:
            sets[examples.name] = load_examples(
                examples.name,
                examples.data,
                config.adapt,
                tokenizer,
                config.data.sequence_length,
                lambda name, stage, done, total, job=job: job.set(done),
            )
        if examples.weight and not sets[examples.name].train:
            raise UserError(f"adapt.examples of '{examples.name}': nothing is left to learn from; add examples")
    return ExampleCorpus(config, tokenizer, sets, dict(origin.fingerprints.corpora))


def _frozen(starting_point: StartingPoint, named: Path) -> Checkpoint:
    """The checkpoint of the reference: what the run began with, byte for byte. Raises UserError if it is gone."""
    if starting_point.initial_model is not None:
        return starting_point.initial_model
    kept = starting_point.tokenizer_checkpoint.state[REFERENCE]
    # Runs of earlier versions name it by an absolute path, which stays one.
    before = Path(resolve_stored_path(kept["path"], starting_point.config.run.dir))
    for path in (before, named):
        if path.exists() and (copy := resolve(path)).sha256 == kept["sha256"]:
            return copy
    raise UserError(
        f"the reference model of this run was {before}, which is gone or changed: put it back, or name a "
        "copy of it as MODEL"
    )
