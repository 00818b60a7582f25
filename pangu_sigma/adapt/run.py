"""The adaptation job: the training run, on examples instead of the domains' text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.adapt.examples import ExampleSet, load_examples
from pangu_sigma.adapt.rows import ExampleSampler, HeldoutExamples, HeldoutPairs, sampler_of
from pangu_sigma.checkpoint import Checkpoint, find_latest, resolve
from pangu_sigma.config import Config
from pangu_sigma.config.adapting import load_adaptation, run_dir_of
from pangu_sigma.config.mesh_rules import check_one_process
from pangu_sigma.data.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.load import stored_config, stored_tokenizer
from pangu_sigma.monitor.terminal import progress
from pangu_sigma.signals import sigterm_as_ctrl_c
from pangu_sigma.train.run import Run
from pangu_sigma.train.schedule import phase_at

if TYPE_CHECKING:
    from pangu_sigma.train.objective import Objective
    from pangu_sigma.train.reference import Reference

# Key of the trainer state that says which checkpoint is the frozen reference: {"path", "sha256"}.
REFERENCE = "reference"


def adapt(model: Path, file: Path, objective: str, overrides: tuple[str, ...] = (), resume: bool = False) -> Path:
    """Fine-tune `model` (a run, checkpoint or model folder) as the YAML `file` says; return the new run's folder.

    `objective`: sft or dpo. A run that resumes takes what it is from its own checkpoint; `model` then only has to be
    there where it is the frozen reference. Raises UserError.
    """
    base, start = _base(model, file, overrides, resume)
    config = load_adaptation(file, overrides, objective, base, start)
    check_one_process(config, "set parallel={}")
    with sigterm_as_ctrl_c(), AdaptationRun(config, resume, model) as run:
        run.loop()
    return Path(config.run.dir)


def _base(model: Path, file: Path, overrides: tuple[str, ...], resume: bool) -> tuple[Config, str]:
    """The configuration that the file lies over, and the path of the model to begin with."""
    folder = run_dir_of(file, overrides)
    if resume and folder is not None:
        own, _ = find_latest(Path(folder).expanduser())
        if own is not None:
            stored = stored_config(own)
            return stored, stored.run.init_from or str(model)
    checkpoint = resolve(model)
    return stored_config(checkpoint), str(model)


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

    def heldout(self) -> dict[str, HeldoutExamples | HeldoutPairs]:
        """Held-out examples by domain; domains without any are left out."""
        kind = {"sft": HeldoutExamples, "dpo": HeldoutPairs}[self.config.adapt.objective]
        length, pad_id = self.config.data.sequence_length, self.tokenizer.pad_id
        return {name: kind(examples, length, pad_id) for name, examples in self.sets.items() if examples.heldout}

    def unigram_losses(self) -> dict[str, float]:
        """No unigram model is set beside an adaptation."""
        return {}


class AdaptationRun(Run):
    """A run over examples. Corpus fingerprints and probes are the adapted model's, whose domains' text they tell of."""

    def __init__(self, config: Config, resume: bool, model: Path) -> None:
        super().__init__(config, resume)
        self.named = model

    def _corpus(self, tokenizer_of: Checkpoint | None) -> ExampleCorpus:
        # A new run has the adapted model's checkpoint here, one that resumes its own.
        self.origin = tokenizer_of
        self.frozen = self._frozen() if self.config.adapt.objective == "dpo" else None
        tokenizer = stored_tokenizer(tokenizer_of)
        sets = {}
        for examples in self.config.adapt.examples:
            with progress(f"tokenise {examples.name}", None, unit="examples") as job:
                sets[examples.name] = load_examples(
                    examples.name,
                    examples.data,
                    self.config.adapt,
                    tokenizer,
                    self.config.data.sequence_length,
                    lambda name, stage, done, total, job=job: job.set(done),
                )
            if examples.weight and not sets[examples.name].train:
                raise UserError(f"adapt.examples of '{examples.name}': nothing is left to learn from; add examples")
        return ExampleCorpus(self.config, tokenizer, sets, dict(tokenizer_of.fingerprints.corpora))

    def _frozen(self) -> Checkpoint:
        """The checkpoint of the reference: what the run began with, byte for byte. Raises UserError if it is gone."""
        if self.start is not None:
            return self.start
        kept = self.origin.state[REFERENCE]
        for path in (Path(kept["path"]), self.named):
            if path.exists() and (found := resolve(path)).sha256 == kept["sha256"]:
                return found
        raise UserError(
            f"the reference model of this run was {kept['path']}, which is gone or changed: put it back, or name a "
            "copy of it as MODEL"
        )

    def _token_counts(self) -> dict[str, np.ndarray]:
        return {}

    def _objective(self) -> Objective:
        from pangu_sigma.adapt.preference import Preference
        from pangu_sigma.train.objective import Objective
        from pangu_sigma.train.reference import load_reference
        from pangu_sigma.train.trainer import micro_batch_rows

        wanted = self.config.adapt
        if wanted.objective == "sft":
            return Objective(auxiliary=wanted.auxiliary_losses)

        def load() -> Reference:
            return load_reference(self.frozen, self.config, micro_batch_rows(self.config, objective))

        objective = Preference(wanted.beta, load, wanted.auxiliary_losses)
        return objective

    def _evaluator(self):
        if self.config.adapt.objective == "sft":
            return super()._evaluator()
        from pangu_sigma.adapt.preference import PreferenceEvaluator

        return PreferenceEvaluator(self.model, self.trainer.objective, self.config.evaluate.batch_size)

    def _sampler(self, resumed: bool) -> ExampleSampler:
        config = self.config
        own = {examples.name: examples.weight for examples in config.adapt.examples}

        def weights(step: int) -> dict[str, float]:
            phases = config.train.phases
            written = phases[phase_at(config, step).index].weights if phases else None
            return own if written is None else dict(written)

        return sampler_of(
            self.corpus.sets,
            config.domain_names,
            config.adapt.objective,
            config.data.sequence_length,
            self.corpus.tokenizer.pad_id,
            weights,
            config.run.seed,
            config.data.domains_per_step,
        )

    def _own_state(self) -> dict[str, object]:
        if self.frozen is None:
            return super()._own_state()
        return {**super()._own_state(), REFERENCE: {"path": str(self.frozen.path), "sha256": self.frozen.sha256}}

    def _probe(self, count: int) -> dict[str, np.ndarray]:
        """The adapted model's own probe: sequences of its domains' text, cut to this run's length."""
        length = self.config.data.sequence_length + 1
        found = {name: rows[:count, :length] for name, rows in self.origin.probe().items()}
        return {name: rows for name, rows in found.items() if rows.shape[0] and rows.shape[1] == length}
