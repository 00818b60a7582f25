"""Folder layout of a run's checkpoints: the files' names, and which file a tensor belongs to.

    run/checkpoints/step-00001200/
        shared.safetensors                    every tensor that belongs to no domain
        domains/{domain}.safetensors          a domain's experts, routing tables and word embedding
        optimizer/shared.safetensors          the optimizer state, split in the same way
        optimizer/domains/{domain}.safetensors
        probe.safetensors                     held-out sequences per domain, `probe.{domain}` int32 [sequences, S + 1]
        config.yaml, state.json, tokenizer/*  effective configuration, trainer state, tokenizer files
        manifest.json                         written last: a folder without it is no checkpoint

The rule: a tensor's name gives its *group* (the path above without the ending); a group is one file, or several
numbered ones (`shared-00001-of-00003.safetensors`) when it is larger than the shard size.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from pangu_sigma.tensor_names import PROBE, parse_name

FORMAT_VERSION = 1
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
STATE = "state.json"
TOKENIZER = "tokenizer"
ENDING = ".safetensors"

_NUMBERED = re.compile(r"-\d{5}-of-\d{5}$")
_DOMAIN = re.compile(r"\w[\w-]{0,63}")
_SHARD = re.compile(r"(?P<group>.+?)(-\d{5}-of-\d{5})?\.safetensors")
_STEP_FOLDER = re.compile(r"(?:\.(?P<kind>tmp|trash|replaced)-)?step-(?P<step>\d{8,})(?:-(?P<pid>\d+))?")


def check_domains(domains: Sequence[str]) -> None:
    """Raises ValueError unless the names can be file names and parts of tensor names, also where case is ignored."""
    for domain in domains:
        if not _DOMAIN.fullmatch(domain) or _NUMBERED.search(domain):
            raise ValueError(
                f"the domain name {domain!r} cannot name a file: use 1 to 64 letters, digits, '_' and '-' (not first)"
            )
    folded = [domain.casefold() for domain in domains]
    if len(set(folded)) != len(folded):
        raise ValueError(f"domain names must differ by more than upper and lower case: {', '.join(domains)}")


def group_of(name: str) -> str:
    """The group (file path without shard number and ending) that the tensor `name` belongs to."""
    parsed = parse_name(name)
    if parsed.module == PROBE:
        return PROBE
    group = "shared" if parsed.domain is None else f"domains/{parsed.domain}"
    return f"optimizer/{group}" if parsed.is_optimizer else group


def group_of_file(path: str) -> str | None:
    """The group of a tensor file's path inside the checkpoint; None for files that hold no tensors."""
    match = _SHARD.fullmatch(path)
    return match["group"] if match else None


def shard_paths(group: str, shards: int) -> list[str]:
    """The file paths of a group that is cut into `shards` files."""
    if shards == 1:
        return [group + ENDING]
    return [f"{group}-{i:05d}-of-{shards:05d}{ENDING}" for i in range(1, shards + 1)]


def cut_into_shards(sizes: Iterable[tuple[str, int]], max_bytes: int) -> list[list[str]]:
    """Fills shards of at most `max_bytes` in the order given; a larger tensor gets a shard of its own.

    `sizes` are (name, bytes). Only the group's own tensors decide, so no other domain moves a tensor between files.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes:
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def is_safe_path(path: str) -> bool:
    """Whether `path` is a plain relative path with forward slashes that stays inside its folder."""
    if not path or "\\" in path or "\0" in path or path != PurePosixPath(path).as_posix():
        return False
    parts = PurePosixPath(path).parts
    return not PurePosixPath(path).is_absolute() and not any(part.startswith(".") for part in parts)


def step_name(step: int) -> str:
    """The folder name of a checkpoint: `step-00001200`."""
    return f"step-{step:08d}"


def working_name(kind: str, step: int, pid: int) -> str:
    """The name of a folder that is no checkpoint (yet, or any more): kind is `tmp`, `trash` or `replaced`."""
    return f".{kind}-{step_name(step)}-{pid}"


def parse_folder(path: Path) -> tuple[str | None, int, int] | None:
    """(kind, step, pid) of a folder in `checkpoints/`; kind None and pid 0 for a checkpoint; None for foreign names."""
    match = _STEP_FOLDER.fullmatch(path.name)
    if match is None or (match["kind"] is None) != (match["pid"] is None):
        return None
    return match["kind"], int(match["step"]), int(match["pid"] or 0)
