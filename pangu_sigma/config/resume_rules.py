"""What `--resume` makes of keys that are not those of the run's stored configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pangu_sigma.config.differences import Difference, differences, joined
from pangu_sigma.config.domain_edits import phases_done
from pangu_sigma.config.init_from import with_vocabulary_size
from pangu_sigma.config.load_config import load_values
from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import Section
from pangu_sigma.config.training_sections import own_warmup
from pangu_sigma.errors import UserError
from pangu_sigma.wording import shown


class ChangedKeys(NamedTuple):
    """Keys in which two effective configurations differ, by whether a run may resume with the new value."""

    allowed: tuple[Difference, ...]
    refused: tuple[Difference, ...]


def changed_keys(old: Config, new: Config, step: int) -> ChangedKeys:
    """The keys in which two effective configurations differ, where a run has done `step` steps with the first.

    Each field says what may change. Phases may ahead of `step`. Ends of a decay and of a warm-up that follow
    train.steps, which effective configurations write out, are no keys that anybody changed.
    """
    phases_stay = phases_done(old.to_dict()["train"], step) == phases_done(new.to_dict()["train"], step)
    fixed = ("fixed",) if phases_stay else ("fixed", "ahead")
    followed = _followed(old) & _followed(new)
    changes = [change for change in differences(old, new) if change.key not in followed]
    return ChangedKeys(
        tuple(change for change in changes if change.resume not in fixed),
        tuple(change for change in changes if change.resume in fixed),
    )


def check_resume(old: Config, new: Config, step: int) -> ChangedKeys:
    """The changes, all of them allowed; raises UserError that names the refused keys with their old and new values."""
    changes = changed_keys(old, new, step)
    if changes.refused:
        raise UserError(
            f"a run cannot resume with other values: {joined(changes.refused)}; restore them or choose another run.dir"
        )
    return changes


def with_kept_keys(config: Config, stored: Config, step: int) -> tuple[Config, list[str]]:
    """`config`, by which a run that has done `step` steps as `stored` says resumes, with the run's own value of each
    key that must stay and that nobody wrote, and a message where these differ.

    What it follows from may have changed: the number of processes, the version of this program. Raises UserError where
    the run's value does not fit what is written.
    """
    now = with_vocabulary_size(config, stored.model.vocab_size)
    refused = {change.key: change.before for change in changed_keys(stored, now, step).refused}
    values, kept = config.written(), []
    for path, section, key, value in list(_unwritten(config, values)):
        section[key] = refused.get(path, value)  # all of them, because some follow from others
        if path in refused:
            kept.append(f"{path} = {shown(refused[path])}")
    if not kept:
        return config, []
    resumed = load_values(values, f"{config.run.dir} keeps its values")
    return resumed, [f"keeps what nobody wrote as the run began with it: {joined(kept)}"]


def _unwritten(section: Section, written: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict, str, Any]]:
    """Every key that follows from others because nobody wrote it: its path, where it would be written, value."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _unwritten(value, written.setdefault(name, {}), f"{path}{name}.")
        elif type(section).has_fill(name) and written.get(name) is None:
            yield f"{path}{name}", written, name, value


def with_changeable_keys(stored: Config, now: Config) -> dict[str, Any]:
    """The stored configuration as a mapping, with what may change whatever was done as it is in `now`."""
    values, new = stored.to_dict(), now.to_dict()
    for name, section in stored:
        for key in type(section).model_fields if isinstance(section, Section) else ():
            if section.decisions_of(key)[0] in ("free", "rounding"):
                values[name][key] = new[name][key]
    return values


def _followed(config: Config) -> set[str]:
    """The keys of the schedule whose values are those that follow from train.steps."""
    schedule, steps = config.schedule, config.train.steps
    values = {"decay_steps": steps - schedule.anneal_steps, "warmup_steps": own_warmup(steps, schedule)}
    return {f"schedule.{name}" for name, value in values.items() if getattr(schedule, name) == value}
