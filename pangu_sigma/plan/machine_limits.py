"""Memory and disk space of this machine, as far as a process may use them."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def memory_limit(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> int:
    """Bytes of memory that a process can have here at most: RAM or the smallest limit of its control groups (a
    container's, a batch job's), with swap; less under a limit on its address space (ulimit -v).

    proc, cgroups: where Linux mounts them.
    """
    limit, swap = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0
    with suppress(OSError, ValueError):
        lines = (line.split() for line in (proc / "meminfo").read_text(encoding="ascii").splitlines())
        kib = {line[0]: int(line[1]) for line in lines if len(line) > 1}
        limit, swap = kib["MemTotal:"] * 1024, kib.get("SwapTotal:", 0) * 1024
    limit = min([limit, *_group_limits(proc, cgroups)])
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(limit + swap, address_space) if address_space != resource.RLIM_INFINITY else limit + swap


def _group_limits(proc: Path, cgroups: Path) -> list[int]:
    """Memory limits of this process's control groups, and of those that they are in; version 1 and 2."""
    limits: list[int] = []
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, name = (
                (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
            )
            folder = root / group.lstrip("/")
            for above in (folder, *folder.parents):
                # A container sees its own group as the root; unlimited ones have a word or no file.
                with suppress(OSError, ValueError):
                    limits.append(int((above / name).read_text(encoding="ascii")))
                if above == root:
                    break
    return limits


def free_disk(folder: Path) -> int:
    """Free bytes of the file system that `folder` is, or will be, on.

    Of one without any size, which takes no files, the largest number: writing there says itself why it cannot be.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else sys.maxsize
