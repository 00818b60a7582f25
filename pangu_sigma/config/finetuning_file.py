"""Fine-tuning configuration: the file of an `sft` or `dpo` run, laid over its model's configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pangu_sigma.config.load_config import load_values, read_config
from pangu_sigma.config.overrides import Overrides, changes_of
from pangu_sigma.config.schema import Config
from pangu_sigma.errors import UserError

# What the model is, and how its texts are read: taken over from it, key by key, where the file says nothing.
_TAKEN_OVER = ("model", "domains", "data")


def run_dir_of(path: Path, overrides: Overrides) -> str | None:
    """The run.dir that a file and overrides name, before anything else of them is looked at; None if there is none."""
    named = next((change.value for change in reversed(changes_of(overrides)) if change.path == "run.dir"), None)
    if named is None:
        section = read_config(path).get("run")
        named = section.get("dir") if isinstance(section, Mapping) else None
    return named if isinstance(named, str) else None


def load_adaptation(
    path: Path, overrides: Overrides, objective: str, model: Config, init_from: str
) -> Config:
    """The effective configuration of an adaptation file over that of the model at `init_from`.

    The sections model, domains and data are the model's, but for the keys that the file or an override writes.
    `objective`: sft or dpo, which the file must not contradict. Raises UserError as `load_config` does.
    """
    values = read_config(path)
    adapt = values.get("adapt")
    if not isinstance(adapt, dict):
        raise UserError(f"{path}: the section adapt is missing: it names the examples to adapt the model with")
    named = adapt.setdefault("objective", objective)
    if named in ("sft", "dpo") and named != objective:
        raise UserError(f"{path}: adapt.objective is {named}: run it with pangu-sigma {named}")
    run = values.get("run")
    if isinstance(run, dict):
        if run.get("init_from") is not None:
            raise UserError(f"{path}: run.init_from is the model named on the command line: leave it out of the file")
        run["init_from"] = init_from
    base = copy.deepcopy(model.to_dict())
    # The model's own run keeps its tokenised text; this one makes its own where it is evaluated.
    base["data"]["stream"] = None
    if Path(base["data"]["cache"]).is_relative_to(base["run"]["dir"]):
        base["data"]["cache"] = None
    for section in _TAKEN_OVER:
        values[section] = _over(base[section], values.get(section))
    return load_values(values, str(path), overrides)


def _over(base: Any, written: Any) -> Any:
    if written is None:
        return base
    if isinstance(base, dict) and isinstance(written, dict):
        return {**base, **{key: _over(base.get(key), value) for key, value in written.items()}}
    return written


def without_adaptation(values: dict[str, Any]) -> None:
    """Makes the configuration of an adapted model, as a mapping, one that trains on its domains' text (in place)."""
    values["adapt"] = None
    if values["data"]["heldout_fraction"] == 0:
        # They came from held-out examples, and of the domains' text nothing is held out.
        values["evaluate"]["every"] = 0
        values["checkpoint"]["probe_sequences"] = 0
