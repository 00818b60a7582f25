"""The doctor's rows, in the order in which a first user needs them."""

from __future__ import annotations

import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from pangu_sigma.doctor import check_processes
from pangu_sigma.doctor.ascend_software import Ascend, look
from pangu_sigma.doctor.check_results import Check, failed, passed, skipped
from pangu_sigma.plan.machine_limits import memory_limit

KERNELS_TOLERANCE = 1e-5  # compiled against composed kernels, relative: both float32
DEVICE_TOLERANCE = 5e-3  # a device against the CPU: Ascend may multiply float32 matrices in less
SECONDS = 300.0
CANN = ("8.2", "8.3", "8.5", "9.0")  # what MindSpore 2.9.0 itself checks for, the newest last
GIB = 2**30
WITHOUT_NPU = "no Ascend device on this machine"


def examine(count: int = 2, seconds: float = SECONDS, root: Path = Path("/")) -> Iterator[Check]:
    """Every row, each made when it is asked for; at most `seconds` for one that starts processes.

    `count` processes meet in an all-to-all; `root` is where Ascend's files are looked for.
    """
    ascend = look(root)
    with tempfile.TemporaryDirectory(prefix="pangu-sigma-doctor-") as scratch:
        folder = Path(scratch)
        known: dict[str, check_processes.ProcessResult] = {}

        def step(device: str, kernels: str) -> check_processes.ProcessResult:
            # Several rows compare with the same two steps.
            name = f"{device}-{kernels}"
            if name not in known:
                known[name] = check_processes.step(device, kernels, folder / name, seconds)
            return known[name]

        yield python()
        yield mindspore()
        yield kernels()
        yield memory()
        yield cann(ascend)
        yield driver(ascend)
        yield devices(ascend)
        yield cpu_step(step("CPU", "composed"))
        yield compiled_step(step)
        yield npu_step(step, ascend)
        yield all_to_all("all-to-all, CPU processes", "CPU", count, folder / "cpu", seconds)
        yield npu_exchange(ascend, count, folder / "npu", seconds)


def python() -> Check:
    """The interpreter's version."""
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return passed("Python", f"{version} on {platform.machine()}")
    return failed("Python", version, "install Python 3.11 or 3.12, for which MindSpore 2.9 and numpy 1.26 have wheels")


def mindspore() -> Check:
    """The installed MindSpore against the one that this version is made for."""
    pinned = _pinned("mindspore")
    try:
        installed = metadata.version("mindspore")
    except metadata.PackageNotFoundError:
        return failed("MindSpore", "not installed", f"pip install mindspore=={pinned or '2.9.0'}")
    if pinned is not None and installed != pinned:
        return failed("MindSpore", f"{installed}, made for {pinned}", f"pip install mindspore=={pinned}")
    return passed("MindSpore", installed)


def _pinned(package: str) -> str | None:
    """The version of a package that our own installation asks for; None where we run from a bare source folder."""
    try:
        required = metadata.requires("pangu-sigma") or []
    except metadata.PackageNotFoundError:
        return None
    return next((m[1] for line in required if (m := re.fullmatch(rf"{package}==([^;\s]+)", line))), None)


def kernels() -> Check:
    """Whether the compiled CPU kernels are there and run."""
    library_path = _library()
    if library_path is not None:
        return passed("compiled CPU kernels", Path(library_path).name)
    return skipped(
        "compiled CPU kernels", "not built, or not for this processor: MindSpore's operators do the work, slower",
        "install gcc and install pangu-sigma again, if training on this machine's CPU is to be fast",
    )  # fmt: skip


def _library() -> str | None:
    """The path of the compiled kernels; None also where MindSpore, on whose matrix product they rest, is missing."""
    try:
        from parallel.ops.compiled_kernels import library
    except ImportError:
        return None
    return library()


def memory() -> Check:
    """What the host has: an expert store in host memory takes 12 bytes a parameter of it."""
    total = memory_limit() / GIB
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / GIB
    experts = total * GIB / 12 / 1e9
    return passed("host memory", f"{total:.0f} GiB, {free:.0f} free; {experts:.1f} B expert parameters would fill it")


def cann(ascend: Ascend) -> Check:
    """Ascend's toolkit."""
    if ascend.toolkit is None and ascend.absent:
        return skipped("CANN", WITHOUT_NPU)
    if ascend.cann is not None and not ascend.cann.startswith(CANN):
        advice = f"install CANN {CANN[-1]}, which MindSpore 2.9.0 is released with"
        return failed("CANN", f"{ascend.cann}; MindSpore 2.9.0 asks for {', '.join(CANN)}", advice)
    if ascend.toolkit is not None:
        return passed("CANN", f"{ascend.cann or 'version unknown'} in {ascend.toolkit}")
    return failed("CANN", "no toolkit found", "install CANN (docs/cluster.md tells the version), source its set_env.sh")


def driver(ascend: Ascend) -> Check:
    """Ascend's driver."""
    if ascend.driver is not None:
        return passed("Ascend driver", ascend.driver)
    if ascend.absent:
        return skipped("Ascend driver", WITHOUT_NPU)
    return failed("Ascend driver", "not found", "install it, or mount /usr/local/Ascend/driver into the container")


def devices(ascend: Ascend) -> Check:
    """Devices of the machine."""
    if ascend.devices:
        return passed("NPU visible", f"{len(ascend.devices)}: " + ", ".join(f"davinci{n}" for n in ascend.devices))
    if ascend.absent:
        return skipped("NPU visible", WITHOUT_NPU)
    return failed("NPU visible", "no /dev/davinci*", "check npu-smi info; in a container pass --device=/dev/davinci0 …")


def cpu_step(done: check_processes.ProcessResult) -> Check:
    """Two steps of the trainer on the CPU, composed of MindSpore's operators."""
    name = "step on CPU"
    if done.trouble:
        return failed(name, done.trouble, "install the pinned versions afresh: MindSpore cannot compute here")
    result = done.results[0]
    first, second = result["losses"]
    if not (math.isfinite(second) and second < first):
        return failed(name, f"loss {first:.4f}, then {second:.4f}", "an update must lower it: report this machine")
    began, went_on = result["seconds"]
    times = f"{began:.1f} s with compiling, then {went_on:.3f} s"
    return passed(name, f"loss {first:.4f}, then {second:.4f}; {times}")


def compiled_step(step: Callable[[str, str], check_processes.ProcessResult]) -> Check:
    """The compiled kernels' numbers against the composed ones'."""
    name = "compiled kernels against composed"
    if _library() is None:
        return skipped(name, "no compiled kernels in this installation")
    return _compared(
        name, step("CPU", "composed"), step("CPU", "compiled"), KERNELS_TOLERANCE,
        "set run.kernels=composed and report this processor",
    )  # fmt: skip


def npu_step(step: Callable[[str, str], check_processes.ProcessResult], ascend: Ascend) -> Check:
    """A device's numbers against the CPU's."""
    name = "step on NPU, against the CPU's"
    if not ascend.devices:
        return skipped(name, WITHOUT_NPU)
    return _compared(
        name, step("CPU", "composed"), step("Ascend", "auto"), DEVICE_TOLERANCE,
        "check that CANN and driver fit MindSpore (docs/cluster.md); device and message go into a report",
    )  # fmt: skip


def _compared(
    name: str,
    reference: check_processes.ProcessResult,
    other: check_processes.ProcessResult,
    tolerance: float,
    advice: str,
) -> Check:
    for done in (reference, other):
        if done.trouble:
            return failed(name, done.trouble, advice)
    a, b = reference.results[0], other.results[0]
    pairs = list(zip([*a["losses"], *a["norms"]], [*b["losses"], *b["norms"]], strict=True))
    worst = max(abs(x - y) / abs(x) if math.isfinite(y) else math.inf for x, y in pairs)
    difference = f"losses and gradient norms of two steps differ by {worst:.1e} at most, {tolerance:.0e} allowed"
    if worst > tolerance:
        return failed(name, difference, advice)
    return passed(name, f"{difference}; a step takes {b['seconds'][-1]:.3f} s")


def npu_exchange(ascend: Ascend, count: int, folder: Path, seconds: float) -> Check:
    """An all-to-all between devices."""
    name = "all-to-all, NPUs"
    if len(ascend.devices) < 2:
        return skipped(name, "one Ascend device" if ascend.devices else WITHOUT_NPU)
    return all_to_all(name, "Ascend", min(count, len(ascend.devices)), folder, seconds)


def all_to_all(name: str, device: str, count: int, folder: Path, seconds: float) -> Check:
    """One all-to-all with its gradient between processes, exact."""
    done = check_processes.exchange(device, count, folder, seconds)
    if done.trouble:
        return failed(name, done.trouble, "processes must reach each other on 127.0.0.1: see this machine's firewall")
    wrong = [str(r["rank"]) for r in done.results if not (r["rows"] and r["gradients"] and r["size"] == count)]
    if wrong:
        return failed(name, f"wrong on rank {', '.join(wrong)} of {count}", "report MindSpore's version and device")
    slowest = max(r["seconds"] for r in done.results)
    return passed(name, f"{count} processes, rows and gradients exact, {slowest:.1f} s with compiling")
