"""Small result files, written whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pangu_sigma.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` by a temporary file and a rename, so that a reader never sees half of it.

    Raises UserError where it cannot be written; what stood there before still does then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free some space, or make its folder one that can be written"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document the same way."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
