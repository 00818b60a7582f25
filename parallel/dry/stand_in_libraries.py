"""Stand-in CUDA libraries, so that MindSpore's wheel loads its GPU front end on a machine without GPU and CUDA.

That front end shares the semi-auto-parallel pass with Ascend's. Every function of a stand-in returns "no device":
nothing can be computed with them, and nothing is. They are made from the symbols that the wheel asks for, by gcc and
objdump.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from parallel.comm.atomic_folder import atomic_folder, rename_unless_there

# (file that the wheel asks for, how its symbols begin); the first match counts.
LIBRARIES = (
    ("libcublas.so.11", r"cublas"),
    ("libcurand.so.10", r"curand"),
    ("libcudnn.so.8", r"cudnn"),
    ("libcusolver.so.11", r"cusolver"),
    ("libcufft.so.10", r"cufft"),
    ("libcusparse.so.11", r"cusparse"),
    ("libnvrtc.so.11.2", r"nvrtc"),
    ("libcudart.so.11.0", r"(__)?cuda[A-Z_R]"),
    ("libcuda.so.1", r"cu[A-Z]"),
)
ALIASES = {
    "libcudart.so": "libcudart.so.11.0",
    "libcudart.so.11.6.55": "libcudart.so.11.0",
    "libcudnn.so.8.5.0": "libcudnn.so.8",
}
# Parts of the wheel that ask for symbols, under its plugin folder.
ASKING = (
    "libmindspore_gpu.so.11.6",
    "gpu/libcuda_ops.so.11",
    "gpu11.6/libnccl.so.2",
    "gpu11.6/libnvidia_collective.so",
)
NO_DEVICE = 100  # cudaErrorNoDevice


class DryCompileError(RuntimeError):
    """The dry compile cannot run here, or MindSpore refused the graph."""


def plugin_folder() -> Path:
    """The wheel's plugin folder. Raises DryCompileError if this wheel has no GPU front end."""
    spec = importlib.util.find_spec("mindspore")
    folder = Path(spec.submodule_search_locations[0]) / "lib" / "plugin" if spec else Path()
    if not (folder / ASKING[0]).is_file():
        raise DryCompileError("this MindSpore has no GPU front end: the check needs its wheel for Linux x86-64")
    return folder


def make_standins(folder: Path) -> Path:
    """Write the libraries and an nvcc that only tells its version under `folder`, whole or not at all; return it."""
    if folder.is_dir():
        return folder
    for tool in ("gcc", "objdump"):
        if shutil.which(tool) is None:
            raise DryCompileError(f"{tool} is missing: install gcc and binutils")
    plugin = plugin_folder()
    symbols: dict[str, str | None] = {}
    for part in ASKING:
        symbols.update(_wanted_symbols(plugin / part))
    with atomic_folder(folder, rename_unless_there, shared=True) as unfinished:
        _write(unfinished, symbols)
    return folder


def _wanted_symbols(shared_object: Path) -> dict[str, str | None]:
    """Symbol -> version (or None) that a shared object expects from elsewhere."""
    table = subprocess.run(["objdump", "-T", shared_object], capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"\*UND\*\s+\S+[^\S\n]+(?:\(?([\w.]+)\)?[^\S\n]+)?(\S+)$", table, re.MULTILINE)
    return {symbol: version or None for version, symbol in symbols}


def _write(root: Path, symbols: dict[str, str | None]) -> None:
    lib, binaries = root / "lib64", root / "bin"
    lib.mkdir()
    binaries.mkdir()
    members: dict[str, dict[str, str | None]] = {name: {} for name, _ in LIBRARIES}
    for symbol, version in symbols.items():
        owner = next((name for name, begin in LIBRARIES if re.match(begin, symbol)), None)
        if owner is not None:
            members[owner][symbol] = version
    for name, exported in members.items():
        _compile(lib / name, exported, root)
    for alias, target in ALIASES.items():
        os.symlink(target, lib / alias)
    nvcc = binaries / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 11.6, V11.6.55"\n')
    nvcc.chmod(0o755)


def _compile(library: Path, symbols: dict[str, str | None], scratch: Path) -> None:
    source, versions = scratch / "standin.c", scratch / "standin.map"
    lines = [f"int {s}(void) {{ return {0 if s.startswith('__cuda') else NO_DEVICE}; }}" for s in symbols]
    source.write_text("\n".join(lines) or "int none;")
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(library), str(source), f"-Wl,-soname,{library.name}"]
    tags = sorted({version for version in symbols.values() if version and version != "Base"})
    if tags:
        of_tag = {tag: "".join(f" {s};" for s, v in symbols.items() if v == tag) for tag in tags}
        versions.write_text("".join(f"{tag} {{ global:{names} }};\n" for tag, names in of_tag.items()))
        command.append(f"-Wl,--version-script={versions}")
    subprocess.run(command, check=True)
    source.unlink()
    versions.unlink(missing_ok=True)
