"""What Ascend's software leaves in the file system: CANN, driver, devices. Nothing is imported for it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

TOOLKIT_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
TOOLKITS = ("usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/cann", "root/Ascend/ascend-toolkit/latest")
_INFO_FILES = ("ascend_toolkit_install.info", "version.info", "compiler/version.info", "runtime/version.info")
DRIVER = "usr/local/Ascend/driver/version.info"
# `Version=8.5.0` or `version=[7.7.T9.0.B057:8.1.RC1]`, as the versions write it
_VERSION = re.compile(r"^\s*version\s*=\s*\[?(?:[^\]\s:]*:)?([^\]\s]+?)\]?\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Ascend:
    """Device numbers of the machine, version and folder of CANN, version of the driver; None where not found."""

    devices: tuple[int, ...]
    toolkit: Path | None
    cann: str | None
    driver: str | None

    @property
    def absent(self) -> bool:
        """Whether nothing of Ascend's is here."""
        return not self.devices and self.toolkit is None and self.driver is None


def look(root: Path = Path("/")) -> Ascend:
    """What is found below `root`; a toolkit that the environment names counts wherever it lies."""
    devices = sorted(
        int(match[1]) for path in (root / "dev").glob("davinci*") if (match := re.fullmatch(r"davinci(\d+)", path.name))
    )
    named = [Path(os.environ[name]) for name in TOOLKIT_VARIABLES if os.environ.get(name)]
    folders = [folder for folder in (*named, *(root / name for name in TOOLKITS)) if folder.is_dir()]
    toolkit = folders[0] if folders else None
    return Ascend(tuple(devices), toolkit, _toolkit_version(toolkit), version_in(root / DRIVER))


def _toolkit_version(toolkit: Path | None) -> str | None:
    if toolkit is None:
        return None
    # The install information lies in a folder named after the architecture.
    files = [toolkit / name for name in _INFO_FILES]
    files += [folder / _INFO_FILES[0] for folder in sorted(toolkit.glob("*-linux"))]
    return next((version for file in files if (version := version_in(file)) is not None), None)


def version_in(file: Path) -> str | None:
    """The version that an information file of Ascend's writes; None if it does not or is not there."""
    try:
        match = _VERSION.search(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1] if match else None
