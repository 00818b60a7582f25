"""Arguments of the functions of `import pangu_sigma as ps`: paths, results that stand for their folder, lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pangu_sigma.errors import UserError

PathLike = str | os.PathLike[str]
Overrides = Mapping[str, Any] | Iterable[str | tuple[str, Any]]


def folder(model: PathLike) -> Path:
    """The folder of a model: a path, or a result that lies in one. Raises UserError for anything else."""
    try:
        return Path(model)
    except TypeError:
        raise UserError(
            f"a {type(model).__name__} stands for no folder: give a path, or a result that lies in one, as that of "
            "train, load or extract"
        ) from None


def run_folder(run: PathLike) -> Path:
    """The folder of a run: a path, or that of a result or model that lies in a run. Raises UserError."""
    return Path(getattr(run, "run_dir", None) or folder(run))


def path_or_none(path: PathLike | None) -> Path | None:
    """The path, if one is given."""
    return None if path is None else folder(path)


def items(given: Any) -> list[Any]:
    """The items of a list; a text or path is one."""
    return [given] if isinstance(given, str | os.PathLike) else list(given)
