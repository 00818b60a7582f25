"""Edits of a run's configuration where its domains are added, removed or renamed: the domains and the plan of training.

Steps that were done keep their phase, so that what the run was stands in its configuration; only what lies ahead
changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from pangu_sigma.config.finetuning_file import without_adaptation
from pangu_sigma.config.load_config import config_from_dict
from pangu_sigma.config.phase_domains import old_domains
from pangu_sigma.config.schema import Config
from pangu_sigma.config.training_sections import PhaseConfig, RegulariseConfig
from pangu_sigma.config.validation_messages import problems_of
from pangu_sigma.errors import UserError


@dataclass(frozen=True)
class FollowUpTraining:
    """Training that follows an edit of the domains, in the place of the plan's remaining phases: `steps` on `name`.

    shared: what the shared parameters do: frozen, train, or regularised by what `regularise` (a `RegulariseConfig` as a
    mapping) says. replay: share of the samples (0 to below 1) that the other domains give, by their own weights. Raises
    UserError for what has no effect.
    """

    name: str
    steps: int
    shared: str = "frozen"
    replay: float = 0.0
    regularise: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.replay and self.shared == "frozen":
            raise UserError(
                f"replay = {self.replay:g} has no use with shared = frozen, where no other domain's experts can "
                "change: leave one of the two out"
            )


def plan_follow_up(
    name: str, steps: int | None, shared: str, replay: float, regularise: Mapping[str, Any] | None
) -> FollowUpTraining | None:
    """The training that follows an edit, None without `steps`. Raises UserError for settings that are out of range or
    have no effect."""
    weights = {} if regularise is None else dict(regularise)
    try:
        PhaseConfig(steps=steps, shared=shared, replay=replay, regularise=weights)
    except ValidationError as error:
        raise UserError(problems_of(error, PhaseConfig)[0].sentence) from None
    is_held = any(weights.get(term) for term in ("output", "l2", "ewc"))
    if steps is None:
        if shared != "frozen" or replay or is_held:
            raise UserError(
                "shared, output, l2, ewc and replay say how the new domain trains: say for how long with steps"
            )
        return None
    if is_held and shared != "regularised":
        raise UserError("output, l2 and ewc hold the shared parameters: set shared to regularised")
    if not is_held and shared == "regularised":
        raise UserError("shared = regularised needs to know by what: give output, l2 or ewc a weight above 0")
    return FollowUpTraining(name, steps, shared, replay, weights if is_held else None)


def checked(values: dict[str, Any], source: str) -> Config:
    """The changed configuration. A mesh that does not hold the changed domains is left out of `values`: whoever trains
    on names another. Raises UserError for whatever else is wrong."""
    try:
        return config_from_dict(values, source)
    except UserError:
        if values["parallel"] == {}:
            raise
        config = config_from_dict({**values, "parallel": {}}, source)
    values["parallel"] = {}
    return config


def add_domain(values: dict[str, Any], domain: dict[str, Any], step: int, follow_up: FollowUpTraining | None) -> None:
    """Adds `domain` (a `DomainConfig` as a mapping) to the configuration of a run that has done `step` steps."""
    values["domains"].append(domain)
    if follow_up is not None:
        regularise = follow_up.regularise
        phase = {
            "steps": follow_up.steps,
            "weights": {follow_up.name: 1.0},
            "shared": follow_up.shared,
            "domains": [follow_up.name] if follow_up.shared == "frozen" else None,
            "restart": True,
            "replay": follow_up.replay,
            "old": [entry["name"] for entry in values["domains"] if entry["name"] != follow_up.name]
            if follow_up.replay or _looks_back(regularise)
            else None,
            # Every key of the section, so that the plan can be changed again.
            "regularise": None if regularise is None else RegulariseConfig(**regularise).model_dump(),
        }
        done = phases_done(values["train"], step)
        values["train"]["steps"] = step + follow_up.steps
        values["train"]["phases"] = [*done, phase]
    _mend(values, step)


def replace_phases(
    values: dict[str, Any], phases: Sequence[Mapping[str, Any]], max_domains_per_batch: int | None
) -> None:
    """Makes `phases` the whole plan of a run, done ones included; `max_domains_per_batch` is cut to those there are."""
    limit = max_domains_per_batch and min(max_domains_per_batch, len(values["domains"]))
    values["data"]["max_domains_per_batch"] = limit
    values["train"]["phases"] = [dict(phase) for phase in phases]
    values["train"]["steps"] = sum(phase["steps"] for phase in phases)
    values["train"]["stop_at"] = None


def remove_domain(values: dict[str, Any], name: str, step: int) -> None:
    """Takes the domain `name` out of the configuration; phases ahead that draw nothing else are left out."""
    values["domains"] = [entry for entry in values["domains"] if entry["name"] != name]
    if not sum(entry["weight"] for entry in values["domains"]):
        for entry in values["domains"]:
            entry["weight"] = 1.0
    limit = values["data"]["max_domains_per_batch"]
    values["data"]["max_domains_per_batch"] = limit and min(limit, len(values["domains"]))
    train = values["train"]
    done = [_without(phase, name) for phase in phases_done(train, step)]
    left = phases_ahead(train, step)
    ahead = [_without(phase, name) for phase in left if _draws_another(phase, name)]
    if train["phases"] and (done or ahead):
        train["phases"] = done + ahead
        train["steps"] = sum(phase["steps"] for phase in train["phases"])
    elif train["phases"]:
        train["phases"] = []
    _mend_old(values)
    stream = values["data"]["stream"]
    if stream is not None and stream["domain"] == name:
        values["data"]["stream"] = None
    if values.get("adapt") is not None:
        left_over = [entry for entry in values["adapt"]["examples"] if entry["name"] != name]
        if sum(entry["weight"] for entry in left_over):
            values["adapt"]["examples"] = left_over
        else:
            without_adaptation(values)
    _mend(values, step)


def rename_domain(values: dict[str, Any], old: str, new: str) -> None:
    """Gives the domain `old` the name `new`, wherever the configuration names it."""
    for entry in values["domains"]:
        entry["name"] = new if entry["name"] == old else entry["name"]
    for phase in values["train"]["phases"]:
        if phase["weights"] is not None:
            phase["weights"] = {new if name == old else name: weight for name, weight in phase["weights"].items()}
        if phase["domains"] is not None:
            phase["domains"] = [new if name == old else name for name in phase["domains"]]
        if phase.get("old") is not None:
            phase["old"] = [new if name == old else name for name in phase["old"]]
    stream = values["data"]["stream"]
    if stream is not None and stream["domain"] == old:
        stream["domain"] = new
    for entry in (values.get("adapt") or {}).get("examples", ()):
        entry["name"] = new if entry["name"] == old else entry["name"]


def phases_done(train: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The phases of the steps before `step`, the last one cut there; one that trains everything if none is set."""
    phases = train["phases"] or [PhaseConfig(steps=train["steps"]).model_dump(mode="json")]
    done, start = [], 0
    for index, phase in enumerate(phases):
        # A checkpoint may lie behind the end of the plan, which the last phase then covers.
        length = step - start if index == len(phases) - 1 else min(phase["steps"], step - start)
        if length > 0:
            done.append({**phase, "steps": length})
        start += phase["steps"]
    return done


def phases_ahead(train: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The phases of the steps from `step` on, the first one cut there."""
    ahead, start = [], 0
    for phase in train["phases"]:
        end = start + phase["steps"]
        if end > step:
            ahead.append({**phase, "steps": end - max(start, step)})
        start = end
    return ahead


def _draws_another(phase: dict[str, Any], name: str) -> bool:
    weights, domains = phase["weights"], phase["domains"]
    if domains is not None and phase["shared"] == "frozen" and not set(domains) - {name}:
        return False
    return weights is None or any(weight for other, weight in weights.items() if other != name)


def _without(phase: dict[str, Any], name: str) -> dict[str, Any]:
    weights, domains = phase["weights"], phase["domains"]
    if weights is not None:
        weights = {other: weight for other, weight in weights.items() if other != name}
        weights = weights if sum(weights.values()) else None
    if domains is not None:
        domains = [other for other in domains if other != name]
        if not domains and phase["shared"] == "frozen":
            # Nothing trained but the removed domain: the steps were done, so only the form has to be right.
            domains = None
    kept = phase.get("old")
    if kept is not None:
        kept = [other for other in kept if other != name]
    return {**phase, "weights": weights, "domains": domains, "old": kept}


def _looks_back(regularise: Mapping[str, Any] | None) -> bool:
    """Whether what holds a phase is measured on, or through, its old domains."""
    return bool(regularise and (regularise.get("ewc") or regularise.get("through") == "old"))


def _mend_old(values: dict[str, Any]) -> None:
    """Phases whose last old domain is gone replay nothing and have no Fisher information to go by."""
    train = values["train"]
    for index, phase in enumerate(train["phases"]):
        if phase.get("old") == []:
            phase["old"] = None
        view = SimpleNamespace(
            domains=[SimpleNamespace(**entry) for entry in values["domains"]],
            domain_names=[entry["name"] for entry in values["domains"]],
            train=SimpleNamespace(phases=[SimpleNamespace(**{"old": None, **entry}) for entry in train["phases"]]),
        )
        regularise = phase.get("regularise")
        if phase.get("replay") and (phase["weights"] is None or not old_domains(view, index)):
            phase["replay"] = 0.0
        if _looks_back(regularise) and not old_domains(view, index):
            regularise["ewc"], regularise["through"] = 0.0, "own"
            if not regularise["output"] and not regularise["l2"]:
                phase["shared"], phase["regularise"] = "train", None
        if not phase.get("replay") and not _looks_back(phase.get("regularise")):
            phase["old"] = None


def _mend(values: dict[str, Any], step: int) -> None:
    """What would stop the next training at once, or refers to steps that are no more, is taken back."""
    train, run = values["train"], values["run"]
    if train["stop_at"] is not None and not step < train["stop_at"] <= train["steps"]:
        train["stop_at"] = None
    profile = run["profile"]
    if profile is not None and profile["start"] + profile["steps"] - 1 > train["steps"]:
        run["profile"] = None
