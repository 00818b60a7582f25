"""One entry for every format: checks what the user asked for, writes into a hidden folder, gives it its name last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from extract.export.source import open_source
from pangu_sigma.checkpoint.disk import Writing
from pangu_sigma.errors import UserError

# format -> (module with `write(source, folder, options)` and `needed_bytes(source, options)`, package, extra of it)
FORMATS: dict[str, tuple[str, str | None, str | None]] = {
    "hf": ("extract.export.hf", None, None),
    "mindir": ("extract.export.mindir", None, None),
    "onnx": ("extract.export.onnx_model", "onnx", "onnx"),
}


@dataclass(frozen=True)
class Options:
    """What the formats can be told. `dtype` of floating tensors; shapes that only a fixed graph needs; shard size."""

    dtype: str = "float32"
    batch_size: int = 1
    capacity_factor: float | None = None
    max_shard_bytes: int = 4 << 30


def export(
    model: str | Path,
    out: str | Path,
    format_: str,
    domains: Sequence[str] | None = None,
    options: Options | None = None,
) -> list[str]:
    """Write the model of a run, checkpoint or model folder to the new folder `out`; returns what there is to say.

    `domains`: whose experts go along, None for all. Raises UserError for a mistake, before anything is written where
    that can be known.
    """
    writer = _writer(format_)
    final = free_folder(out)
    source = open_source(model, domains)
    options = options or Options()
    with _named_last(final, writer.needed_bytes(source, options)) as folder:
        return writer.write(source, folder, options)


def _writer(format_: str):
    if format_ not in FORMATS:
        raise UserError(f"'{format_}' is no format to export to; choose {', '.join(FORMATS)}")
    module, package, extra = FORMATS[format_]
    if package is not None and find_spec(package) is None:
        raise UserError(f"exporting to {format_} needs the package {package}: pip install 'pangu-sigma[{extra}]'")
    return import_module(module)


def free_folder(out: str | Path) -> Path:
    """The absolute path of a folder that can be made; UserError if something is there."""
    path = Path(os.path.realpath(os.path.expanduser(out)))
    if path.is_dir():
        if next(path.iterdir(), None) is not None:
            raise UserError(f"{out} exists and is not empty: choose another folder or empty it")
    elif path.exists():
        raise UserError(f"{out} is a file: choose a folder")
    return path


@contextmanager
def _named_last(final: Path, needed: int) -> Iterator[Path]:
    """A hidden folder beside `final`, which gets that name when all went well and goes away when not."""
    writing = Writing(str(final), "written", final.parent, "choose another folder")
    hidden = final.with_name(f".{final.name}.unfinished-{os.getpid()}")
    with writing.explained(needed):
        final.parent.mkdir(parents=True, exist_ok=True)
        writing.check_space([needed], 0)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        try:
            yield hidden
            os.rename(hidden, final)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


Progress = Callable[[int], None]
