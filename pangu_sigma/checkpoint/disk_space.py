"""Disk space and file-system errors in plain sentences: a check before anything is written, and errors explained."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pangu_sigma.errors import CheckpointError, disk_advice

_BLOCK = 4096
_MANIFEST_BYTES_PER_TENSOR = 768


@dataclass
class DiskWrite:
    """A write to disk, as errors describe it: "`what` was not `done`: …; free some space or `alternative``ending`".

    needed: bytes that it takes, once `check_space` knows them.
    """

    what: str
    done: str
    folder: Path
    alternative: str
    ending: str = ""
    needed: int | None = None

    def check_space(self, sizes: Iterable[int], tensors: int) -> None:
        """CheckpointError unless files of these sizes and a manifest of `tensors` tensors fit on the disk."""
        self.needed = sum((size // _BLOCK + 2) * _BLOCK for size in sizes) + tensors * _MANIFEST_BYTES_PER_TENSOR
        free = shutil.disk_usage(self.folder).free
        if self.needed > free:
            raise CheckpointError(
                f"{self.what} was not {self.done}: it needs {human_bytes(self.needed)}, and {human_bytes(free)} are "
                f"free in {self.folder}; free some space or {self.alternative}{self.ending}"
            )

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turn an OSError of the block into a CheckpointError of one sentence, which names the bytes needed."""
        try:
            yield
        except OSError as error:
            space = ""
            if self.needed is not None:
                with suppress(OSError):
                    free = human_bytes(shutil.disk_usage(self.folder).free)
                    space = f" (it needs {human_bytes(self.needed)}, {free} are free)"
            raise CheckpointError(
                f"{self.what} was not {self.done}: {error.filename or self.folder}: {error.strerror}{space}; "
                f"{disk_advice(error.errno, self.alternative)}{self.ending}"
            ) from error


def human_bytes(count: float) -> str:
    """A number of bytes as `512 B`, `3.4 MiB`, `1.2 GiB`, and so on up to `3,400.0 EiB`."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
