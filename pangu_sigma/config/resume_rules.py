"""Keys that `--resume` may change and keys that it may not, by comparison with the run's stored configuration."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from pangu_sigma.config.schema import Config
from pangu_sigma.config.validation_messages import shown
from pangu_sigma.errors import UserError

# Keys that change neither a parameter, nor a moment, nor which text is drawn at the steps that both runs have.
_ALLOWED = re.compile(
    r"run\.(dir|init_from|log_every|tensorboard|profile.*)"
    r"|train\.(steps|stop_at|nonfinite|skip_budget)"
    r"|evaluate\..*"
    r"|checkpoint\.(every|every_seconds|keep)"
    r"|data\.(prefetch|cache|stream\.path)"
    r"|experts\..*"  # where tables lie changes no value beyond rounding, and a checkpoint none at all
    # Who computes what changes no value beyond rounding.
    r"|parallel\.(data|expert|tensor|pipeline|optimizer_parallel|sequence_parallel|expert_chunks)"
    r"|parallel\.(emulate_mesh|workers|timeout)"
    r"|model\.preset"  # only a name: the sizes that it filled in are compared themselves
)


class ChangedKeys(NamedTuple):
    """Keys in which two effective configurations differ, by whether a run may resume with the new value."""

    allowed: tuple[str, ...]
    refused: tuple[str, ...]


def changed_keys(old: Config, new: Config) -> ChangedKeys:
    """The keys in which two effective configurations differ; domains are named, not numbered (`domains.code.experts`).

    Allowed are keys that leave every step that both have as it was: run.* except seed and device, train.steps,
    stop_at, nonfinite and skip_budget, evaluate.*, checkpoint.every, every_seconds and keep, data.prefetch, cache and
    stream.path, experts.*, parallel.* except placement. A longer train.steps moves the end of a decay that
    follows it (schedule.decay_steps, written out in an effective configuration), which is refused; a constant schedule
    has no such end, unless it anneals. The last phase may grow or shrink with train.steps, unless its own decay ends
    with it.
    """
    before, after = flat_keys(old), flat_keys(new)
    changed = [key for key in {**before, **after} if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    may_change = set()
    constant = old.schedule.kind == new.schedule.kind == "constant"
    # The end of a decay that a phase began anew is the phase's own end.
    if old.train.phases and (constant or not old.train.phases[-1].restart):
        may_change.add(f"train.phases.{len(old.train.phases) - 1}.steps")
    if constant:
        may_change.add("schedule.decay_steps")
    # An anneal ends with the run: a longer one had other rates in its last steps.
    fixed = {"train.steps"} if old.schedule.anneal_steps or new.schedule.anneal_steps else set()
    allowed = tuple(key for key in changed if key not in fixed and (key in may_change or _ALLOWED.fullmatch(key)))
    return ChangedKeys(allowed, tuple(key for key in changed if key not in allowed))


def check_resume(old: Config, new: Config) -> ChangedKeys:
    """The changes, all of them allowed; raises UserError that names every refused key with its old and new value."""
    changes = changed_keys(old, new)
    if changes.refused:
        before, after = flat_keys(old), flat_keys(new)
        named = "; ".join(
            f"{key} was {shown(before.get(key))} and is {shown(after.get(key))}" for key in changes.refused[:5]
        )
        more = f"; and {len(changes.refused) - 5} more" if len(changes.refused) > 5 else ""
        raise UserError(f"a run cannot resume with other values: {named}{more}; restore them or choose another run.dir")
    return changes


_ABSENT = object()


def flat_keys(config: Config) -> dict[str, Any]:
    """Key path -> value of every key; domains are named (`domains.code.experts`), and `domains` lists their names."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            named = path == "domains"
            if named:
                # Ids are positions, so the order of the domains is itself a fact that must not change.
                flat["domains"] = [item["name"] for item in value]
            for index, inner in enumerate(value):
                walk(inner, f"{path}.{inner['name'] if named else index}")
        else:
            flat[path] = value

    walk(config.to_dict(), "")
    return flat
