"""Small result files, written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pangu_sigma.errors import UserError, disk_advice
from pangu_sigma.json_reader import UnreadableText, read_object
from parallel.comm.atomic_folder import process_exists


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to whose name what the block writes there is renamed; a failure leaves nothing.

    A reader never sees half of it; what stood there before still does after a failure. What a killed process left goes.
    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    for left in (temporary, *path.parent.glob(f".{glob.escape(path.name)}.*")):
        pid = left.suffix.removeprefix(".")
        if left == temporary or (pid.isdecimal() and not process_exists(int(pid))):
            left.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all. Raises UserError where it cannot be written."""
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): {disk_advice(error.errno, 'name another folder')}"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document the same way."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object of a JSON document that was written before; None where there is none. Raises UserError for a damaged
    one."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        advice = disk_advice(error.errno, "restore it")
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    except UnreadableText as error:
        raise UserError(f"{error.at(f'{path} is damaged')}; delete it, and it is made again") from None
