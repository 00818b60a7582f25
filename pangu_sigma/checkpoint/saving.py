"""Saving a checkpoint, so that at every moment the folder that carries its name is whole.

Files go into a hidden folder, each synced to disk; then the manifest; then the folder gets its name in one rename. A
process that dies on the way leaves a hidden folder, which nobody takes for a checkpoint and the next save removes.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import layout
from pangu_sigma.checkpoint.cleaning import discard, held, list_checkpoints, prune, remove_stale
from pangu_sigma.checkpoint.errors import CheckpointError
from pangu_sigma.checkpoint.manifest import Fingerprints, Manifest, coverage_cells, manifest_bytes
from pangu_sigma.checkpoint.planning import PlannedFile, find_unchanged, plan_content, plan_tensor_files
from pangu_sigma.checkpoint.reading import Checkpoint, open_checkpoint
from pangu_sigma.checkpoint.tensor_file import spec_of
from pangu_sigma.checkpoint.writing import FolderWriter, sync_folder

_BLOCK = 4096
_MANIFEST_BYTES_PER_TENSOR = 768
_HINTS = {
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose smaller shards",
    errno.EACCES: "make the folder writable or choose another run.dir",
    errno.EROFS: "choose a run.dir on a disk that can be written",
}
_FREE_SPACE = "free some space or choose another run.dir"


@dataclass(frozen=True)
class SaveResult:
    """What a save did. `links_refused` counts unchanged files that had to be written because no link was possible."""

    path: Path
    bytes_written: int
    bytes_linked: int
    links_refused: int
    seconds: float
    deleted: tuple[Path, ...]
    messages: tuple[str, ...]


def save_checkpoint(
    run_dir: Path | str,
    step: int,
    tensors: Mapping[str, np.ndarray],
    *,
    domains: Sequence[str],
    coverage: Mapping[str, Mapping[str, int]],
    config_text: str,
    tokenizer_files: Mapping[str, bytes],
    probe: Mapping[str, np.ndarray],
    state: Mapping[str, Any],
    fingerprints: Fingerprints,
    keep: int,
    max_shard_bytes: int = 4 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> SaveResult:
    """Saves `run_dir/checkpoints/step-…`, then deletes all but the `keep` newest checkpoints.

    tensors: name → array, of the shapes the model has; written without a copy (non-contiguous: one at a time).
    coverage: sparse layer → domain → number of experts. probe: domain → int32 [sequences, S + 1].
    state: anything JSON holds. progress(bytes_done, bytes_total) is called in this thread while files are written.

    Files whose content the newest checkpoint has already are hard-linked. A checkpoint of the same step is replaced.
    Raises CheckpointError when the disk is too small or fails (the last checkpoint stays whole, nothing is left
    behind), ValueError for arguments that make no whole checkpoint.
    """
    started = time.perf_counter()
    run_dir = Path(run_dir)
    if keep < 1 or step < 0 or max_shard_bytes < 1:
        raise ValueError(f"{keep=} and {max_shard_bytes=} must be at least 1, {step=} at least 0")
    layout.check_domains(domains)
    _check_tensor_names(tensors, domains)
    everything = {**tensors, **_probe_tensors(probe, domains)}
    specs = [spec_of(name, array) for name, array in everything.items()]
    cells = coverage_cells(coverage, domains, specs)
    planned = plan_tensor_files(specs, max_shard_bytes)
    planned.append(plan_content(layout.CONFIG, config_text.encode()))
    planned.append(plan_content(layout.STATE, json.dumps(state, allow_nan=False, ensure_ascii=False).encode()))
    for name, content in sorted(tokenizer_files.items()):
        path = f"{layout.TOKENIZER}/{name}"
        if "/" in name or not layout.is_safe_path(path):
            raise ValueError(f"the tokenizer file name {name!r} is no plain file name")
        planned.append(plan_content(path, content))

    root = run_dir / layout.CHECKPOINTS
    with _explained(root, step, None):
        root.mkdir(parents=True, exist_ok=True)
    messages = remove_stale(run_dir)
    previous, said = _newest(run_dir, step)
    messages += said
    temporary = root / layout.working_name("tmp", step, os.getpid())
    with ThreadPoolExecutor(2) as threads:
        if previous is not None:
            find_unchanged(planned, everything, previous, threads)
        needed = _check_space(root, step, planned, len(specs))
        with _explained(root, step, needed):
            temporary.mkdir()
            with held(temporary):
                try:
                    writer = FolderWriter(temporary, everything, threads, sum(file.size for file in planned), progress)
                    for file in planned:
                        writer.write(file)
                    manifest = Manifest(
                        format_version=layout.FORMAT_VERSION,
                        step=step,
                        domains=tuple(domains),
                        fingerprints=fingerprints,
                        coverage=cells,
                        files=writer.files,
                        tensors=dict(sorted(writer.tensors.items())),
                    )
                    writer.finish(manifest_bytes(manifest))
                    final = _move_into_place(temporary, root / layout.step_name(step))
                except BaseException:
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise
    deleted, said = prune(run_dir, keep, final)
    if writer.links_refused:
        messages.append(f"{writer.links_refused} unchanged files were written again: {root} refused to link them")
    return SaveResult(
        path=final,
        bytes_written=writer.bytes_written,
        bytes_linked=writer.bytes_linked,
        links_refused=writer.links_refused,
        seconds=time.perf_counter() - started,
        deleted=tuple(deleted),
        messages=tuple(messages + said),
    )


def _check_tensor_names(names: Iterable[str], domains: Sequence[str]) -> None:
    for name in names:
        domain = layout.domain_of(name)
        if domain is not None and domain not in domains:
            raise ValueError(f"tensor {name!r} belongs to {domain!r}, which is not among the domains {list(domains)}")
        if name.startswith(f"{layout.PROBE}.") or name == "__metadata__":
            raise ValueError(f"the tensor name {name!r} is reserved")


def _probe_tensors(probe: Mapping[str, np.ndarray], domains: Sequence[str]) -> dict[str, np.ndarray]:
    for domain, sequences in probe.items():
        if domain not in domains or sequences.dtype != np.int32 or sequences.ndim != 2:
            raise ValueError(f"the probe of {domain!r} must be int32 [sequences, S + 1] of one of the domains")
    return {f"{layout.PROBE}.{domain}": sequences for domain, sequences in probe.items()}


def _newest(run_dir: Path, step: int) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to link unchanged files from, and what is odd about the run's checkpoints."""
    checkpoints, _ = list_checkpoints(run_dir)
    messages = []
    if later := [path.name for number, path in checkpoints if number > step]:
        messages.append(
            f"{run_dir} also holds checkpoints of later steps ({', '.join(later)}), from which a resume would go on: "
            "delete them if this is the run to keep"
        )
    candidates = [path for number, path in checkpoints if number <= step] or [path for _, path in checkpoints]
    if not candidates:
        return None, messages
    try:
        return open_checkpoint(candidates[-1]), messages
    except CheckpointError as error:
        return None, [*messages, f"every file is written anew, since the last checkpoint cannot be linked to: {error}"]


def _check_space(root: Path, step: int, planned: Iterable[PlannedFile], tensors: int) -> int:
    """Returns the bytes that the save needs on the disk; raises CheckpointError when they are not free."""
    needed = sum((file.size // _BLOCK + 2) * _BLOCK for file in planned if file.link is None)
    needed += tensors * _MANIFEST_BYTES_PER_TENSOR
    free = shutil.disk_usage(root).free
    if needed > free:
        raise CheckpointError(
            f"step {step} was not saved: it needs {_human(needed)}, and {_human(free)} are free in {root}; "
            f"{_FREE_SPACE} (the last checkpoint is whole)"
        )
    return needed


@contextmanager
def _explained(root: Path, step: int, needed: int | None) -> Iterator[None]:
    """Turns what the file system answers into a sentence."""
    try:
        yield
    except OSError as error:
        space = ""
        if needed is not None:
            with suppress(OSError):
                space = f" (the save needs {_human(needed)}, {_human(shutil.disk_usage(root).free)} are free)"
        where = error.filename or root
        raise CheckpointError(
            f"step {step} was not saved: {where}: {error.strerror}{space}; "
            f"{_HINTS.get(error.errno, _FREE_SPACE)} (the last checkpoint is whole)"
        ) from error


def _move_into_place(temporary: Path, final: Path) -> Path:
    """Gives the finished folder its name; an older version of the same step steps aside first and goes afterwards."""
    if os.path.lexists(final) and not (final / layout.MANIFEST).exists():
        discard(final)
    if not os.path.lexists(final):
        os.rename(temporary, final)
        sync_folder(final.parent)
        return final
    _, step, _ = layout.parse_folder(final)
    aside = final.with_name(layout.working_name("replaced", step, os.getpid()))
    with held(final):
        os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(aside, final)
            raise
        sync_folder(final.parent)
        with suppress(OSError):  # the next save removes what stays, and says so
            shutil.rmtree(aside)
    return final


def _human(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
