"""The `optimizer`, `schedule` and `train` sections."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from pangu_sigma.config.data_section import DomainName
from pangu_sigma.config.section import Field, ListOf, Section, Violations, at_most, divides, positive_sum


def _learning_rate(written: Any) -> float:
    """0.38 / model.hidden to two digits, near GPT-3's table (arXiv 2005.14165, table 2.1): 7.4e-5 at a width of 5120.
    At most 2e-3, which left the tiny preset at a lower loss than 1e-3 and 3e-3; a tenth to fine-tune a model."""
    return float(f"{(0.1 if written.adapt else 1.0) * min(0.38 / written.model.hidden, 2e-3):.1e}")


def _warmup_steps(written: Any) -> int:
    """Steps of warm-up before a learning rate that nobody wrote; whoever writes one writes its warm-up."""
    return 0 if written.optimizer.learning_rate else own_warmup(written.train.steps, written.schedule)


def own_warmup(steps: int, schedule: ScheduleConfig) -> int:
    """Steps of warm-up that a run of `steps` gives itself: a tenth, but not into the anneal or past the decay."""
    return max(0, min(steps // 10, 2000, steps - schedule.anneal_steps, schedule.decay_steps or steps))


def _restart_warmup_ratio(written: Any) -> float:
    return 0.05 if written.schedule.warmup_steps is None else 1.0


def _batch_size(written: Any) -> int:
    """16 sequences up to a width of 1024, more beyond, made a multiple of all that divides a batch."""
    unit = written.train.gradient_accumulation_steps * written.parallel.data * written.parallel.expert
    unit *= written.model.sparse.capacity_samples
    size = 2 ** int(math.log2(max(16.0, written.model.hidden / 64)))
    return math.ceil(size / unit) * unit


class OptimizerConfig(Section, resume="fixed", init_from="free"):
    """AdamW with decoupled decay (none on norms and biases) and its own epsilon for experts."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    learning_rate: float | None = Field(None, gt=0, fill=_learning_rate)
    """Peak learning rate, after the warm-up; null: 0.38 / model.hidden, at most 0.002; to fine-tune a tenth."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Number added to the root of the second moment, shared parameters."""
    expert_epsilon: float = Field(1e-8, gt=0)
    """The same for experts, whose gradients are smaller; the paper uses 1e-20."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay; norms and biases have none."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest global norm of the gradient; a larger gradient is scaled down to it."""


class ScheduleConfig(Section, resume="fixed", init_from="free"):
    """Learning rate over the steps: linear warm-up, then a decay to `min_lr_ratio` of the peak."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: int | None = Field(None, ge=0, fill=_warmup_steps)
    """Steps of linear growth from zero; null: train.steps / 10, at most 2000; 0 under a written learning_rate."""
    restart_warmup_ratio: float | None = Field(None, ge=0, le=1, resume="schedule", fill=_restart_warmup_ratio)
    """Largest share of a restarted phase's steps that warm it up; null: 0.05, or 1 under written warmup_steps."""
    decay_steps: int | None = Field(None, ge=1, resume="schedule")
    """Step at which the decay ends, the warm-up included; null takes all before the anneal."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the decay's end, as a share of the peak."""
    anneal_steps: int = Field(0, ge=0, resume="schedule")
    """Last steps of the run, over which the rate falls linearly to 0 from where it stands."""


class LossScaleConfig(Section, resume="fixed", init_from="free"):
    """Dynamic loss scale of float16 training; without effect in the other precisions."""

    initial: float = Field(65536.0, gt=0)
    """Loss scale of the first step."""
    window: int = Field(1000, ge=1)
    """Steps without overflow after which the scale grows."""
    factor: float = Field(2.0, gt=1)
    """Factor of growth, and of the cut after an overflow."""


class RegulariseConfig(Section, resume="ahead", init_from="free"):
    """Regularisation of a phase towards the previous model: the model at the phase's first step, or before it grew."""

    output: float = Field(0.0, ge=0)
    """Weight of KL(previous || now) of the next-token distributions, in nats per token."""
    through: Literal["own", "old"] = "own"
    """Whose experts output compares on the new text: the text's own domain's, or an old domain's."""
    l2: float = Field(0.0, ge=0)
    """Weight of half the squared distance of the shared parameters to the previous ones."""
    ewc: float = Field(0.0, ge=0)
    """The same, each parameter weighed by its Fisher information on the old domains' text."""
    fisher_batches: int = Field(32, ge=1)
    """With ewc, batches of each old domain's text that the Fisher information is estimated on."""


def _trained(value: Any) -> Any:
    """true and false are read as train and frozen."""
    return {True: "train", False: "frozen"}[value] if isinstance(value, bool) else value


class PhaseConfig(Section, resume="ahead", init_from="free"):
    """Phase of training: a run of steps with its own sampling weights and its own trained parameters."""

    steps: int | None = Field(None, ge=1)
    """Steps of this phase; null (the last phase only) takes what is left of train.steps."""
    weights: dict[str, float] | None = None
    """Weight of every domain drawn in this phase (others: 0); null takes the domains' own."""
    shared: Annotated[Literal["train", "frozen", "regularised"], BeforeValidator(_trained)] = "train"
    """Whether the shared parameters train, keep every bit, or train near the previous model."""
    regularise: RegulariseConfig | None = None
    """With shared regularised, the terms that keep the phase near the previous model."""
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of the samples that old domains give, by their own weights, beside weights."""
    old: ListOf[DomainName] | None = None
    """The old domains, of replay and ewc; null: those that earlier phases drew and weights do not."""
    domains: ListOf[DomainName] | None = None
    """Names of the domains whose experts train; null trains all, an empty list none."""
    restart: bool = False
    """Whether the learning rate restarts: warm-up, then a decay that ends with this phase."""

    def weight_violations(self, key: str) -> Violations:
        """Broken rules of the weights of the phase at `key`."""
        weights = self.weights or {}
        negative = [name for name, weight in weights.items() if weight < 0]
        if negative:
            name = f"{key}.weights.{negative[0]}"
            yield f"{name} = {weights[negative[0]]} is negative: set it to 0 or more"
        elif self.weights is not None:
            yield from positive_sum(f"{key}.weights", weights.values())

    def regularise_violations(self, key: str) -> Violations:
        """Broken rules between `shared` and `regularise` of the phase at `key`."""
        terms = self.regularise
        if terms is not None and self.shared != "regularised":
            yield (
                f"{key}.regularise has no effect, since {key}.shared = {self.shared}: set shared to regularised, or "
                "leave regularise out"
            )
        elif self.shared == "regularised" and not (terms and (terms.output or terms.l2 or terms.ewc)):
            yield (
                f"{key}.regularise says by what where {key}.shared = regularised: give output, l2 or ewc a weight "
                "above 0"
            )


class TrainConfig(Section, resume="fixed", init_from="free"):
    """The loop: how many steps of which size, in which precision."""

    steps: int = Field(ge=1, resume="schedule")
    """Optimizer steps of the whole run."""
    batch_size: int | None = Field(None, ge=1, fill=_batch_size)
    """Sequences in an optimizer step; null: 16, or model.hidden / 64 where that is more (a power of 2)."""
    gradient_accumulation_steps: int = Field(1, ge=1, resume="rounding")
    """Micro-batches of an optimizer step, one after the other; divides batch_size."""
    stop_at: int | None = Field(None, ge=1, resume="free")
    """Step after which the run ends early, as if interrupted after a checkpoint."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the computation; parameters and moments are float32. bfloat16: Ascend only."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    nonfinite: Literal["raise", "skip", "rollback"] = Field("raise", resume="free")
    """On a non-finite loss or gradient: stop, skip the step, or return to the last checkpoint."""
    skip_budget: int = Field(10, ge=0, resume="free")
    """How often a run may skip or roll back before it stops."""
    recompute: bool = Field(False, resume="free")
    """Whether activations are computed again for the gradient instead of kept."""
    phases: ListOf[PhaseConfig] = Field((), resume="ahead")
    """Phases of the run, one after the other, as configs/two_stage.yaml shows; an empty list trains everything
    throughout."""

    def violations(self) -> Violations:
        """Broken rules of the section, its phases apart."""
        parts, batch = self.gradient_accumulation_steps, self.batch_size
        yield from divides("train.gradient_accumulation_steps", parts, f"train.batch_size = {batch}", batch)
        yield from at_most("train.stop_at", self.stop_at, f"train.steps = {self.steps}", self.steps)

    def phase_length_violations(self) -> Violations:
        """Whether the phases' steps add up to the run's."""
        total = sum(phase.steps or 0 for phase in self.phases)
        open_end = bool(self.phases) and self.phases[-1].steps is None
        if self.phases and (total >= self.steps if open_end else total != self.steps):
            last = "the phases before the last take" if open_end else "the phases add up to"
            more = "leave at least one step for the last phase"
            more = more if open_end else "they must be equal, or leave out the last"
            yield f"train.phases: {last} {total} steps and train.steps is {self.steps}: {more}"
