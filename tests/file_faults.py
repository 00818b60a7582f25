"""Faults of files: a process is killed at its n-th file operation, or that operation fails with an error number.

`file_faults.c` does it inside the process, below Python, so that every write and sync counts too. A program that runs
`under_faults` may `arm` it and fork (`in_child`); any other command takes it from `armed_environment`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

KILL = 0
ROOT = Path(__file__).parents[1]


@cache
def library() -> Path:
    """The compiled library; made once a process."""
    path = Path(mkdtemp(prefix="file-faults-")) / "faults.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O1", "-fPIC", "-shared", "-o", path, source, "-ldl"], check=True)
    return path


def armed_environment(folder: Path, operation: int, number: int = KILL) -> dict[str, str]:
    """The environment of a command whose operation of this number (from 0) on files below `folder` kills it, or fails
    with the error `number`; a negative one is that of opening and reading."""
    return {**_preloaded(), "FILE_FAULTS": f"{operation}:{number}:{folder}"}


def under_faults(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments`, which may `arm` faults in its children."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=_preloaded(), timeout=3000)


def _preloaded() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(library()), "FILE_FAULTS_LIBRARY": str(library())}


def arm(folder: Path, operation: int, number: int = KILL) -> None:
    """Let this process die at, or fail, its file operation of this number from now on."""
    _loaded().faults_arm(os.fsencode(folder), ctypes.c_long(operation), number)


def operations() -> int:
    """How many operations were counted since `arm`."""
    counted = _loaded().faults_counted
    counted.restype = ctypes.c_long
    return counted()


def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["FILE_FAULTS_LIBRARY"])


KILLED = -1


def in_child(work: Callable[[], object], answers: Mapping[type[BaseException], int] | None = None) -> int:
    """Do `work` in a forked child: 0 if it came to its end, `KILLED`, or the code of `answers` for what it raised.

    Anything else that it raises fails here, with its words."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            work()
        except BaseException as error:
            known = [number for kind, number in (answers or {}).items() if isinstance(error, kind)]
            code = known[0] if known else 1
            if not known:
                os.write(2, f"{error!r}\n".encode())
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return KILLED
    code = os.WEXITSTATUS(status)
    assert code != 1, "the child failed"
    return code
