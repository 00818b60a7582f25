"""From the YAML of a lifelong measurement to what every stage does, all of it checked before anything is written.

A model that grows (whose domains have expert groups of their own, or with a learned gate that is asked to) has the
first stage's domains only, and every other domain comes in with the stage that names it first. Any other model has all
its parameters from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pangu_sigma.config import Config, config_from_dict, load_config
from pangu_sigma.config.config_paths import stored_values
from pangu_sigma.config.load_config import effective, read_values
from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.config.schema_versions import refuse_old_file
from pangu_sigma.config.validation_messages import problems_of
from pangu_sigma.errors import UserError
from pangu_sigma.lifelong.lifelong_config import InferenceConfig, LifelongConfig, PolicyConfig


@dataclass(frozen=True)
class Policy:
    """How a stage treats what was learned before it; see `PolicyConfig`."""

    shared: str
    replay: float
    init: str
    regularise: dict[str, Any] | None = None


@dataclass(frozen=True)
class Stage:
    """One stage: `new` are the domains that it is the first to learn, `known` those of all stages before it."""

    number: int  # from 0
    name: str
    domains: tuple[str, ...]
    new: tuple[str, ...]
    known: tuple[str, ...]
    steps: int
    policy: Policy

    @property
    def folder(self) -> str:
        """The name of the stage's run folder."""
        return f"{self.number + 1:02d}-{self.name}"


@dataclass(frozen=True)
class Plan:
    """A whole measurement. `base`: the configuration with all domains; its run.dir is the measurement's folder.

    grows: whether domains come in with their stages. measure: what is measured after a stage (see `LifelongConfig`), of
    at most measure_batches batches of each text.
    """

    base: Config
    inference: InferenceConfig
    stages: tuple[Stage, ...]
    grows: bool
    measure: str
    measure_batches: int

    @property
    def dir(self) -> Path:
        """The folder of the measurement."""
        return Path(self.base.run.dir)

    @property
    def by_domain(self) -> bool:
        """Whether a text is read by the experts of its domain, so that a domain must be given or inferred."""
        return self.base.model.separates_domains

    @property
    def learned(self) -> dict[str, int | None]:
        """Domain -> number of the stage that learns it first; None for one that is only measured."""
        first = {name: stage.number for stage in reversed(self.stages) for name in stage.domains}
        return {name: first.get(name) for name in self.base.domain_names}

    def run_dir(self, stage: Stage) -> Path:
        """The run's folder of one stage."""
        return self.dir / "stages" / stage.folder

    def end(self, stage: Stage) -> int:
        """Optimizer steps done when `stage` is finished, counted from the first stage's beginning."""
        return sum(other.steps for other in self.stages[: stage.number + 1])

    def domains_after(self, stage: Stage) -> tuple[str, ...]:
        """The model's domains from `stage` on, in the order in which they came."""
        return (*stage.known, *stage.new) if self.grows else self.base.domain_names

    def old(self, stage: Stage) -> tuple[str, ...]:
        """The domains of earlier stages that the stage itself does not learn."""
        return tuple(name for name in stage.known if name not in stage.domains)

    def drawn(self, stage: Stage) -> tuple[str, ...]:
        """The domains that give the stage samples."""
        return (*stage.domains, *(self.old(stage) if stage.policy.replay else ()))

    def phase(self, stage: Stage) -> dict[str, Any]:
        """What `train.phases` says of the stage."""
        weights = {domain.name: domain.weight for domain in self.base.domains}
        policy = stage.policy
        penalties = policy.regularise or {}
        reaches_back = (
            policy.replay or penalties.get("ewc") or (penalties.get("output") and penalties.get("through") == "old")
        )
        return {
            "steps": stage.steps,
            "weights": {name: weights[name] for name in stage.domains},
            "shared": policy.shared,
            "regularise": policy.regularise,
            # A gate that grew would change what the old experts are given: they and their columns stay.
            "domains": list(stage.domains) if policy.shared == "frozen" or self._grown_gate(stage) else None,
            "replay": policy.replay,
            "old": list(self.old(stage)) if reaches_back else None,
            "restart": True,
        }

    def _grown_gate(self, stage: Stage) -> bool:
        return self.grows and not self.by_domain and stage.number > 0

    def config(self, stage: Stage, tokenizer: Path | None = None) -> Config:
        """The configuration of the stage's run. tokenizer: the model file that stands for a trained tokenizer."""
        values = self.base.to_dict()
        entries = {entry["name"]: entry for entry in values["domains"]}
        values["domains"] = [entries[name] for name in self.domains_after(stage)]
        values["run"]["dir"] = str(self.run_dir(stage))
        values["train"]["steps"] = self.end(stage)
        values["train"]["phases"] = [self.phase(other) for other in self.stages[: stage.number + 1]]
        limit = values["data"]["max_domains_per_batch"]
        values["data"]["max_domains_per_batch"] = limit and min(limit, len(values["domains"]))
        # Every stage's phase begins its own decay, which ends with it.
        schedule, first = values["schedule"], self.stages[0].steps
        schedule["decay_steps"] = first
        if self.base.written().get("schedule", {}).get("warmup_steps") is None:
            # It was filled in for the base's train.steps.
            schedule["warmup_steps"] = min(schedule["warmup_steps"], first)
        if tokenizer is not None:
            values["data"]["tokenizer"] |= {"kind": "sentencepiece", "path": str(tokenizer)}
        return config_from_dict(values, source=f"stage {stage.number + 1} ({stage.name})")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return {
            "base": stored_values(self.base, self.dir),
            "grows": self.grows,
            "inference": self.inference.model_dump(mode="json"),
            "measure": self.measure,
            "measure_batches": self.measure_batches,
            "stages": [
                {"name": s.name, "domains": list(s.domains), "steps": s.steps, "policy": vars(s.policy)}
                for s in self.stages
            ],
        }


def load_plan(path: str | Path, overrides: Iterable[str] = ()) -> Plan:
    """The plan of a YAML file; `overrides` change its base configuration once more.

    Raises UserError with one sentence: file, key or stage, what was written and what to write instead.
    """
    stages_config = _read(Path(path))
    try:
        base = load_config(stages_config.base, [*stages_config.changes, *overrides])
    except UserError as error:
        raise UserError(f"{path}: base = {stages_config.base}: {error}") from error
    plan = _plan(stages_config, base, str(path))
    for stage in plan.stages:
        # What cannot be configured is found now, not after the stages before it were trained.
        effective(plan.config(stage))
    return plan


def _plan(stages_config: LifelongConfig, base: Config, source: str) -> Plan:
    if base.run.init_from is not None:
        raise UserError(f"{source}: run.init_from is set, but the stages begin with an untrained model: set it to null")
    if base.train.phases or base.train.stop_at is not None:
        key = "phases" if base.train.phases else "stop_at"
        raise UserError(f"{source}: train.{key} is set, but the stages say what is trained and when: leave it out")
    grows = _grows(stages_config, base, source)
    stages: list[Stage] = []
    known: tuple[str, ...] = ()
    for index, given in enumerate(stages_config.stages):
        where = f"{source}: stage {index + 1}"
        for name in given.domains:
            if name not in base.domain_names:
                there = ", ".join(base.domain_names)
                raise UserError(
                    f"{where} names the domain {name}, which {stages_config.base} does not have: it has {there}"
                )
        if len(set(given.domains)) < len(given.domains):
            raise UserError(f"{where} names a domain twice: name each once")
        if not sum(domain.weight for domain in base.domains if domain.name in given.domains):
            raise UserError(f"{where} draws nothing, as the weight of {', '.join(given.domains)} is 0: raise it")
        taken = [stage.name for stage in stages]
        name = given.name or _free_name(_joined(given.domains), taken)
        if name in taken:
            raise UserError(f"{where} is called {name} like an earlier one: give it another name")
        policy = _policy(index, given.policy, stages_config.policy, grows, base.model, where)
        if policy.replay and not set(known) - set(given.domains):
            raise UserError(f"{where} replays {policy.replay:g} of earlier domains, but learns all of them itself: "
                            "set its policy.replay to 0")  # fmt: skip
        if policy.shared == "frozen" and not base.model.sparse_prefixes:
            raise UserError(f"{where} freezes the shared parameters, but a dense model has no others: "
                            "set policy.shared to train, or model.sparse.layers")  # fmt: skip
        kind, _, of = policy.init.partition(":")
        if kind == "from" and of not in known:
            raise UserError(f"{where} has policy.init = {policy.init}, but before it only {', '.join(known)} "
                            "are there: copy one of these, or take mean")  # fmt: skip
        if kind == "nearest" and not base.model.separates_domains:
            raise UserError(f"{where} has policy.init = nearest, which compares expert groups, and behind a gate there "
                            "are none: take mean, or from:DOMAIN")  # fmt: skip
        new = tuple(domain for domain in given.domains if domain not in known)
        if grows and not base.model.separates_domains and index and new and len(given.domains) > 1:
            raise UserError(f"{where} learns several domains, and a gate grows by one at a time: split it")
        stages.append(Stage(index, name, tuple(given.domains), new, known, given.steps, policy))
        known += new
    batches = stages_config.measure_batches or base.evaluate.batches
    return Plan(base, stages_config.inference, tuple(stages), grows, stages_config.measure, batches)


def _grows(stages_config: LifelongConfig, base: Config, source: str) -> bool:
    model, own_groups = base.model, base.model.separates_domains
    if stages_config.grows is None:
        return own_groups
    if own_groups and not stages_config.grows:
        raise UserError(
            f"{source}: grows = false, but with router {model.router} experts come with their domain: leave it out"
        )
    if stages_config.grows and not (model.sparse_prefixes and model.router_spec.learned):
        what = f"the router {model.router}" if model.sparse_prefixes else "a dense model"
        raise UserError(f"{source}: grows = true, but {what} has no groups to add: leave it out")
    return stages_config.grows


def _policy(index: int, own: PolicyConfig, common: PolicyConfig, grows: bool, model: ModelConfig, where: str) -> Policy:
    if index == 0:
        if any(value is not None for value in own.model_dump().values()):
            raise UserError(f"{where} is the first, and a policy is about what was learned before: leave it out")
        return Policy("train", 0.0, "random")

    def chosen(key: str, default: Any) -> Any:
        values = (getattr(own, key), getattr(common, key))
        return next((value for value in values if value is not None), default)

    policy = Policy(
        shared=chosen("shared", "frozen" if grows and model.separates_domains else "train"),
        replay=chosen("replay", 0.0),
        init=chosen("init", "mean"),
    )
    penalties = chosen("regularise", None)
    if policy.shared == "regularised":
        if penalties is None:
            raise UserError(f"{where} is regularised, and nothing says by what: set policy.regularise")
        policy = replace(policy, regularise=penalties.model_dump(mode="json"))
    elif own.regularise is not None:
        raise UserError(f"{where} has policy.regularise with shared parameters {policy.shared}: set policy.shared to "
                        "regularised, or leave it out")  # fmt: skip
    if policy.replay and policy.shared == "frozen" and grows:
        raise UserError(
            f"{where} replays earlier domains with shared parameters frozen, where nothing of theirs can change: set "
            "policy.replay to 0, or policy.shared to train"
        )
    if not grows and policy.init != "mean":
        raise UserError(f"{where} has policy.init = {policy.init}, but no expert group comes in: leave it out")
    return policy


def _joined(domains: Sequence[str]) -> str:
    name = "+".join(domains)
    return name if len(name) <= 40 else f"{domains[0]}+{len(domains) - 1}"


def _free_name(name: str, taken: Sequence[str]) -> str:
    """`name`, or the first of name-2, name-3, … that no stage has."""
    numbered = (f"{name}-{index}" for index in range(2, len(taken) + 3))
    return next(candidate for candidate in (name, *numbered) if candidate not in taken)


def _read(path: Path) -> LifelongConfig:
    values = read_values(path, "a YAML file with 'schema_version: 2', 'base:' and 'stages:'")
    refuse_old_file(values, str(path))
    if "model" in values and "base" not in values:
        raise UserError(f"{path} is the configuration of one run: write a file with 'base: {path}' and 'stages:'")
    try:
        return LifelongConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {problems_of(error, LifelongConfig)[0].sentence}") from error
