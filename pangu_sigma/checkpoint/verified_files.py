"""Verified files: which files of a run's checkpoints a save may link, because their bytes were looked at.

A save links what has not changed from the checkpoint before. That the manifest of that one has the same hash says what
was written, not what the disk holds by now, and a damaged file would be in every later checkpoint. What is read when,
of the files that are to be linked:

- every save: those that are not, by inode, size and times of change, what this process last read or wrote; those of
  less than 1 MiB; and of the others those not read for longest, in all an eighth of their bytes a save, so that each is
  read about once in eight saves;
- the last save of a run (its end, a signal), a change of domains, a teacher snapshot: all;
- `--resume`, before anything is loaded: all files of the checkpoint.

So a file that somebody wrote to is noticed by the next save, one whose bytes the disk itself lost within eight, and a
save of a large model does not read all of it. What is damaged is written anew from memory, and linked into the older
checkpoints that shared it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint, open_checkpoint
from pangu_sigma.checkpoint.manifest import FileEntry
from pangu_sigma.checkpoint.retention import list_checkpoints
from pangu_sigma.checkpoint.tensor_file import digest_of_file
from pangu_sigma.errors import CheckpointError

_SMALL = 1 << 20
_SHARE = 8


@dataclass(frozen=True)
class _Sighting:
    """A file as it was when its bytes were last known to be right, and the save at which they were read or written."""

    identity: tuple[int, ...]
    save: int


@dataclass
class VerifiedFiles:
    """What one process knows of the files of its run's last checkpoint; a new one knows nothing, so all are read."""

    _sightings: dict[str, _Sighting] = field(default_factory=dict)
    _saves: int = 0
    _bytes_due: float = 0.0

    def read_all(self, checkpoint: Checkpoint, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read every file of `checkpoint`, from which a run goes on. Raises CheckpointError naming the first that is
        damaged. advance: is told the bytes of each file that was read."""
        files = checkpoint.manifest.files
        paths = {path: checkpoint.path / path for path in files}
        before = {path: _identity(file) for path, file in paths.items()}
        for path in _damaged(paths, files, advance):
            files[path].check(paths[path], digest_of_file(paths[path]))
        self._sightings = {path: _Sighting(identity, 0) for path, identity in before.items() if identity}

    def damaged(
        self,
        links: Mapping[str, Path],
        files: Mapping[str, FileEntry],
        *,
        everything: bool = False,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """Which of `links` (path in the checkpoint -> the file that would be linked) are not what `files` says.

        Reads those whose turn it is (see the table above), or `everything`.
        """
        self._saves += 1
        due = set(links) if everything else self._due(links, files)
        damaged = _damaged({path: links[path] for path in links if path in due}, files, advance)
        for path in due.difference(damaged):
            if identity := _identity(links[path]):
                self._sightings[path] = _Sighting(identity, self._saves)
        return damaged

    def _due(self, links: Mapping[str, Path], files: Mapping[str, FileEntry]) -> set[str]:
        known = [
            path
            for path, file in links.items()
            if path in self._sightings and self._sightings[path].identity == _identity(file)
        ]
        large = [path for path in known if files[path].bytes >= _SMALL]
        due = set(links).difference(large)
        total = sum(files[path].bytes for path in large)
        self._bytes_due = min(self._bytes_due + total / _SHARE, total)
        for path in sorted(large, key=lambda path: self._sightings[path].save):
            if files[path].bytes > self._bytes_due:
                break
            due.add(path)
            self._bytes_due -= files[path].bytes
        return due

    def saved(self, folder: Path, linked: Sequence[str], files: Mapping[str, FileEntry]) -> None:
        """Take in the checkpoint `folder` that was just saved; call it when nothing more is linked or deleted.

        Links and deletions change a file's time of change (ctime): linked ones are known again by all else.
        """
        sightings = {}
        for path in files:
            identity, known = _identity(folder / path), self._sightings.get(path)
            if identity is None:
                continue
            if path not in linked:
                sightings[path] = _Sighting(identity, self._saves)
            elif known is not None and known.identity[:-1] == identity[:-1]:
                sightings[path] = _Sighting(identity, known.save)
        self._sightings = sightings


def mend_older(run_dir: Path, saved: Path, damaged: Mapping[str, Path], inodes: Mapping[str, int]) -> list[str]:
    """Put files that were written anew into the older checkpoints that shared the damaged ones; returns messages.

    damaged: path in the checkpoint -> the file that was to be linked. inodes: theirs, where they were.
    """
    messages = []
    others = [path for _, path in list_checkpoints(run_dir)[0] if path != saved]
    written = open_checkpoint(saved).manifest.files if damaged else {}
    for path, file in damaged.items():
        mended = []
        for other in others:
            with suppress(CheckpointError, OSError):
                same_file = (other / path).lstat().st_ino == inodes.get(path)
                if same_file and open_checkpoint(other).manifest.files.get(path) == written[path]:
                    aside = other / f"{path}.mended"
                    aside.unlink(missing_ok=True)
                    os.link(saved / path, aside)
                    os.replace(aside, other / path)
                    mended.append(other.name)
        also = f", also in {', '.join(mended)}" if mended else ""
        messages.append(f"{file} was damaged on the disk: {path} was written anew from memory{also}; check the disk")
    return messages


def inode_of(path: Path) -> int | None:
    """A file's inode number, None where it cannot be told."""
    identity = _identity(path)
    return None if identity is None else identity[1]


def _identity(path: Path) -> tuple[int, ...] | None:
    """Device, inode, size, time of the last write and, last, of any change."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _damaged(
    paths: Mapping[str, Path], files: Mapping[str, FileEntry], advance: Callable[[int], None]
) -> list[str]:
    """Those of `paths` that cannot be read or are not what `files` says; two are read at a time."""

    def is_damaged(path: str) -> bool:
        try:
            files[path].check(paths[path], digest_of_file(paths[path]))
        except CheckpointError:
            return True
        return False

    damaged = []
    with ThreadPoolExecutor(2) as threads:
        for path, is_bad in zip(paths, threads.map(is_damaged, paths), strict=True):
            damaged += [path] if is_bad else []
            advance(files[path].bytes)
    return damaged
