"""The README's commands run as they stand, in order, in a folder of their own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """Lines of the README's shell blocks without their comments; make targets are the suite's own business."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("make ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the repository's configurations, as a user has after a clone."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def test_every_command_of_the_readme_runs(folder):
    assert len(commands()) >= 8
    for line in commands():
        words = shlex.split(line)
        program = [sys.executable, "-m", "pangu_sigma"] if words[0] == "pangu-sigma" else [sys.executable]
        done = subprocess.run([*program, *words[1:]], cwd=folder, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def environment() -> dict[str, str]:
    """This process's environment with the repository importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
