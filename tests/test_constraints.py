"""Every package of the tested environment has one version, in constraints.txt, and the Makefile installs with it."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = [
    line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}


def requirements() -> list[Requirement]:
    """Dependencies of the project with all extras, its own extras left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != project["name"]]


def test_every_line_is_one_version_of_one_package_without_a_path_an_address_or_a_local_build():
    wrong = [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==\d[\w.]*", line)]
    assert wrong == []
    assert len(PINS) == len(LINES) and list(PINS) == sorted(PINS)
    assert "pangu-sigma" not in PINS


def test_every_pin_of_the_project_stands_there_with_the_same_version():
    pinned = {str(requirement): f"=={PINS.get(canonicalize_name(requirement.name))}" for requirement in requirements()}
    assert len(pinned) > 20
    assert [text for text, version in pinned.items() if str(Requirement(text).specifier) != version] == []


def test_every_installation_of_the_makefile_takes_the_constraints_except_the_one_that_makes_them():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installations = [line for line in makefile.splitlines() if "pip install" in line]
    assert len(installations) > 2
    free = [line for line in installations if "--constraint constraints.txt" not in line]
    assert len(free) == 1 and "build/constraints" in free[0]
    stamps = re.findall(r"^\$\(VENV\)/\.installed.*$", makefile, re.M)
    assert stamps and all("constraints.txt" in stamp for stamp in stamps)
