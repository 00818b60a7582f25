"""A run's configuration where its folder lies elsewhere."""

from __future__ import annotations

from os.path import join, relpath
from pathlib import Path
from typing import Any

from pangu_sigma.config.schema import Config


def with_run_folder(config: Config, run_dir: Path) -> dict[str, Any]:
    """The configuration as a mapping, with `run_dir`; a cache that lay in the old run's folder lies in this one."""
    values = config.to_dict()
    old, cache = values["run"]["dir"], values["data"]["cache"]
    values["run"]["dir"] = str(run_dir.resolve())
    inside = relpath(cache, old)
    if not inside.startswith(".."):
        values["data"]["cache"] = join(values["run"]["dir"], inside)
    return values
