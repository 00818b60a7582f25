"""Reads a configuration: YAML file and overrides, or the effective configuration that a run or checkpoint stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from os.path import join, relpath
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pangu_sigma.config.config_paths import resolve_stored_paths, with_absolute_paths
from pangu_sigma.config.overrides import Overrides, apply_overrides, plain_values
from pangu_sigma.config.rules import violations
from pangu_sigma.config.schema import Config
from pangu_sigma.config.schema_versions import SCHEMA_VERSION, refuse_old_file, refuse_old_folder
from pangu_sigma.config.shipped_files import find_file
from pangu_sigma.config.validation_messages import Problem, problems_of
from pangu_sigma.config.yaml_text import MOST_BYTES, parse_yaml
from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import UnreadableText
from pangu_sigma.regular_file import read_at_most
from pangu_sigma.wording import shown


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Overrides = ()) -> Config:
    """The effective configuration of a YAML file, or of the mapping that such a file holds, with overrides applied:
    `{"train.steps": 100, "domains.code.experts": 8}`, or texts as on the command line, `["train.steps=100"]`.

    Effective means: nothing is left to be looked up. Presets and defaults that follow other keys are filled in (`fill`
    of their fields), relative paths (taken from the current folder, or as `paths_from` says) are absolute, and what
    null took from another key is written out: data.cache, schedule.decay_steps, the last phase's steps. Overrides of a
    `Config` act as on the file that it was loaded from.

    Raises UserError with one sentence: file (or override), key, what was written and what is allowed.
    """
    if isinstance(source, Config):
        source = source.written()
    if isinstance(source, Mapping):
        return load_values(plain_values(source, "the configuration"), "the configuration", overrides)
    return load_values(read_config(Path(source)), str(source), overrides)


def load_values(values: dict[str, Any], source: str, overrides: Overrides = ()) -> Config:
    """`load_config` of the mapping that the file `source` holds; the overrides change it."""
    refuse_old_file(values, source)
    has_own_cache = _has_own_cache(values)
    applied = apply_overrides(values, overrides)
    typed = {override.key for override in applied}
    # Text that was tokenised into the run's own folder is looked for in that of `run.dir`, also where another is typed.
    if has_own_cache and not _has_own_cache(values) and typed.isdisjoint({"data", "data.cache"}):
        values["data"]["cache"] = None

    def blame(key: str) -> str:
        for override in reversed(applied):
            if key == override.key or key.startswith(override.key + "."):
                return f"override '{override.text}'"
        return source

    return effective(_validated(values, source, blame))


def config_from_dict(values: Mapping[str, Any], source: str = "the stored configuration") -> Config:
    """The configuration of an effective configuration (`Config.to_dict`); `source` names it in errors.

    Raises UserError as `load_config` does.
    """
    refuse_old_folder(values, source)
    return _validated(copy.deepcopy(dict(values)), source, lambda key: source)


def read_stored(text: str | bytes, file: Path) -> Config:
    """The configuration that a run or model keeps, of the text of its `file`. Raises as `load_config` does."""
    values = values_of(text, str(file), "back what stood there, from a checkpoint of the same run")
    return config_from_dict(resolve_stored_paths(values, file), source=str(file))


def effective(config: Config) -> Config:
    """A configuration with absolute paths and every null that means another key's value written out; idempotent."""
    values = with_absolute_paths(config.to_dict())
    data, schedule, train = values["data"], values["schedule"], values["train"]
    data["cache"] = data["cache"] or own_cache(values["run"]["dir"])
    if schedule["decay_steps"] is None:
        schedule["decay_steps"] = train["steps"] - schedule["anneal_steps"]
    if train["phases"] and train["phases"][-1]["steps"] is None:
        train["phases"][-1]["steps"] = train["steps"] - sum(phase["steps"] for phase in train["phases"][:-1])
    filled = _validated(values, "the effective configuration", lambda key: "the effective configuration")
    return filled.written_as(with_absolute_paths(config.written()))


def with_run_folder(config: Config, run_dir: Path) -> dict[str, Any]:
    """The configuration as a mapping, with `run_dir`; a cache that lay in the old run's folder lies in this one."""
    values = config.to_dict()
    old, cache = values["run"]["dir"], values["data"]["cache"]
    values["run"]["dir"] = str(run_dir.resolve())
    inside = relpath(cache, old)
    if not inside.startswith(".."):
        values["data"]["cache"] = join(values["run"]["dir"], inside)
    return values


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that a YAML file holds, as a mapping that is not yet checked, its paths absolute where they
    start at the file. Raises UserError."""
    return resolve_stored_paths(read_values(path), find_file(path))


def _has_own_cache(values: dict[str, Any]) -> bool:
    """Whether data.cache lies where it does if nobody writes it."""
    run, data = values.get("run"), values.get("data")
    folder = run.get("dir") if isinstance(run, dict) else None
    return isinstance(data, dict) and isinstance(folder, str) and data.get("cache") == own_cache(folder)


def own_cache(run_dir: str) -> str:
    """What data.cache is where nobody wrote it."""
    return join(run_dir, "data")


_CONFIGURATION = f"a YAML configuration that starts with 'schema_version: {SCHEMA_VERSION}'"


def read_values(
    path: Path, what: str = _CONFIGURATION, parse: Callable[[str | bytes], Any] = parse_yaml
) -> dict[str, Any]:
    """The mapping that a YAML file holds, not yet checked. `what`: what the file should be. Raises UserError."""
    try:
        text = read_at_most(find_file(path), MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give a file, as {path / 'config.yaml'} of a run") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of {what}") from error
    return values_of(text, str(path), what, parse)


def values_of(
    text: str | bytes, source: str, what: str = _CONFIGURATION, parse: Callable[[str | bytes], Any] = parse_yaml
) -> dict[str, Any]:
    """The mapping that a YAML text holds, as `read_values` gives it; `source` names it in errors. Raises UserError."""
    try:
        values = parse(text)
    except UnreadableText as error:
        advice = f"write {what}" if error.line is None else "mend that line"
        raise UserError(f"{error.at(source)}: {advice}") from error
    if values is None:
        raise UserError(f"{source} is empty: copy one of the shipped configurations and change it")
    if not isinstance(values, dict):
        raise UserError(f"{source} holds {shown(values)}, not a mapping of sections: write {what}")
    return values


def _validated(values: dict[str, Any], source: str, blame: Callable[[str], str]) -> Config:
    version = values.get("schema_version")
    if version is None:
        raise UserError(f"{source}: schema_version is missing: add the line 'schema_version: {SCHEMA_VERSION}'")
    if version != SCHEMA_VERSION or isinstance(version, (bool, float)):
        raise UserError(
            f"{blame('schema_version')}: schema_version = {shown(version)} cannot be read: this version of pangu-sigma "
            f"reads schema_version {SCHEMA_VERSION}"
        )
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _refusal(problems_of(error), blame) from error
    config = config.filled(config).written_as(values)
    problems = [Problem(sentence.split(" ", 1)[0].rstrip(":"), sentence) for sentence in violations(config)]
    if problems:
        raise _refusal(problems, blame)
    return config


def _refusal(problems: Sequence[Problem], blame: Callable[[str], str]) -> UserError:
    """The error that tells the first of the problems and names the keys of the others."""
    first, *others = problems
    more = ""
    if others:
        keys = ", ".join(dict.fromkeys(problem.key for problem in others))
        more = f" ({len(others)} more problem{'s' if len(others) > 1 else ''}: {keys})"
    return UserError(f"{blame(first.key)}: {first.sentence}{more}")
