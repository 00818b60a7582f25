"""Paths of a configuration: which keys hold them, and where relative ones start.

In memory every path is absolute. What is typed, and what a file written by hand says, starts at the current folder. The
config.yaml that a run or model keeps says `paths_from: file`: its paths start at the folder that it describes, and so
a copied or moved folder is itself and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from os.path import (
    abspath,
    commonpath,
    expanduser,
    isabs,
    join,
    normpath,
    realpath,
    relpath,
)
from pathlib import Path
from typing import Any

from pangu_sigma.config.key_descriptions import inner_section
from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import Section
from pangu_sigma.config.yaml_text import dump_yaml


def change_paths(values: dict[str, Any], change: Callable[[str], str], section: type[Section] = Config) -> None:
    """Change every path of a configuration, valid or not, in place."""
    for name, field in section.model_fields.items():
        value, facts, (inner, _) = values.get(name), field.json_schema_extra or {}, inner_section(field)
        if inner is not None:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    change_paths(item, change, inner)
        elif facts.get("is_path"):
            if isinstance(value, list):
                values[name] = [change(item) if isinstance(item, str) and item else item for item in value]
            elif isinstance(value, str) and value and value != facts["no_path"]:
                values[name] = change(value)


def with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose relative paths start at the current folder; the mapping itself is changed."""
    change_paths(values, lambda path: abspath(expanduser(path)))
    return values


def resolve_stored_paths(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """The configuration that `file` holds, with absolute paths if it says `paths_from: file`; the mapping itself is
    changed.

    Runs and models that were written before that key hold absolute paths: whatever lay in their folder is in the folder
    that the file lies in now.
    """
    if values.get("paths_from") == "file":
        del values["paths_from"]
        home = _folder_of(file)
        change_paths(values, lambda path: resolve_stored_path(path, home))
    elif (before := _older_folder(values, file)) is not None:
        home = _folder_of(file)
        change_paths(values, lambda path: join(home, relpath(path, before)) if _inside(path, before) else path)
        values["run"]["dir"] = home
    return values


def _folder_of(file: Path) -> str:
    """The folder that a config.yaml is about, links followed: a checkpoint's is its run's, any other's its own."""
    from pangu_sigma.checkpoint.folder_layout import CHECKPOINTS  # loads NumPy

    folder = Path(realpath(file)).parent
    return str(folder.parent.parent if folder.parent.name == CHECKPOINTS else folder)


def _older_folder(values: dict[str, Any], file: Path) -> str | None:
    """The run.dir of a configuration without `paths_from` that is complete and lies in a run or model; None of others,
    which are a user's."""
    run, data = values.get("run"), values.get("data")
    paths = [run.get("dir"), data.get("cache")] if isinstance(run, dict) and isinstance(data, dict) else [None]
    if not all(isinstance(path, str) and isabs(path) for path in paths):
        return None
    from pangu_sigma.checkpoint.folder_layout import CHECKPOINTS, CONFIG, MANIFEST, parse_folder

    home = Path(_folder_of(file))
    is_kept = (home / MANIFEST).is_file() or any(map(parse_folder, (home / CHECKPOINTS).glob("*")))
    return paths[0] if is_kept and file.name == CONFIG else None


def _inside(path: str, folder: str) -> bool:
    return isabs(path) and commonpath([normpath(path), normpath(folder)]) == normpath(folder)


def stored_values(config: Config, folder: str | Path, is_model: bool = False) -> dict[str, Any]:
    """The configuration as a mapping whose paths start at `folder`, for a file that describes that folder.

    A path that shares nothing with the folder but the root stays absolute: no folder is moved along with it. is_model:
    the folder is a model's, and goes to others: it is its own `run.dir`, and no path is absolute.
    """
    values = config.to_dict()
    if is_model:
        values["run"]["dir"] = str(folder)
    return with_paths_from_file(values, folder, is_model)


def with_paths_from_file(values: dict[str, Any], folder: str | Path, beyond_root: bool = False) -> dict[str, Any]:
    """A configuration with absolute paths as a file in `folder` says it; the mapping itself is changed. `beyond_root`:
    paths that share nothing with the folder but the root become relative too."""
    values["paths_from"] = "file"
    change_paths(values, lambda path: stored_path(path, folder, beyond_root))
    return values


def stored_text(config: Config, folder: str | Path, is_model: bool = False) -> str:
    """`stored_values` as YAML, which means the same configuration when it is read in `folder`."""
    return dump_yaml(stored_values(config, folder, is_model))


def stored_path(path: str, folder: str | Path, beyond_root: bool = False) -> str:
    """An absolute path as a file in `folder` says it; see `stored_values`."""
    home = realpath(folder)
    # As it was written first: a link in a path stays one, where it leads to the same from the folder's real place.
    for base, target in ((abspath(folder), path), (home, path), (home, realpath(path))):
        relative = relpath(target, base)
        if realpath(join(home, relative)) == realpath(path) and (beyond_root or commonpath([base, target]) != "/"):
            return join(".", relative) if relative.startswith("~") else relative
    return path


def resolve_stored_path(path: str, folder: str | Path) -> str:
    """The absolute path that `stored_path` wrote for a file that lies in `folder` now."""
    return normpath(join(realpath(folder), expanduser(path)))


def with_stored_paths(text: str, folder: str | Path) -> str:
    """A sentence about a run as a file in its `folder` says it: absolute paths in it start at the folder, but for those
    that share nothing with it but the root."""
    for home in (abspath(folder), realpath(folder)):
        for ancestor in [Path(home), *Path(home).parents][:-1]:
            relative = relpath(ancestor, home).replace("\\", r"\\")
            beside = "" if relative == "." else f"{relative}/"
            relative = "./" if relative == "." else relative
            begin = rf"(?<![\w./~-]){re.escape(str(ancestor))}"
            text = re.sub(f"{begin}/", beside, text)
            text = re.sub(rf"{begin}(?![\w-])(?!\.\w)", relative, text)
    return text
