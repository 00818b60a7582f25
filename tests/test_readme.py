"""The README is short, and the commands of the pages run as they stand, in order, in a folder of their own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pangu_sigma.config import load_config

ROOT = Path(__file__).parents[1]
MOST_WORDS = 1800
# The README trains for minutes: here for seconds. The commands of the other pages run as they stand.
SHORT = ["train.steps=12", "train.batch_size=4", "schedule.warmup_steps=2", "evaluate.every=0"]
# Pages of jobs whose first commands need neither an Ascend device nor a foreign program, and come to an end.
JOB_PAGES = (
    "first_steps", "evaluation", "tasks", "extraction", "export", "domains", "conversion", "adaptation", "routers",
    "document_filters", "expert_stores", "parallel", "lifelong_training", "lifelong", "olmoe", "plan",
)  # fmt: skip
# Those of the others: a server, an Ascend cluster, MindFormers.
OTHER_PAGES = ("serving", "cluster", "mindformers")


def blocks(page: str, language: str = "sh") -> list[str]:
    """The blocks of a language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def lines(page: str) -> list[str]:
    """Lines of a page's shell blocks without their comments. Make targets are the suite's own business, a server does
    not end."""
    found = [line.split("#")[0].strip() for block in blocks(page) for line in block.splitlines()]
    return [line for line in found if line and not line.startswith(("make ", "pangu-sigma serve "))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the configurations and pages, as a user has them after a clone, the quickstart's text, and a text
    file and a folder of the user's own."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    run(folder, "pangu-sigma corpora --out build/quickstart")
    (folder / "recipes").mkdir()
    for name, file in (("docs", "letters.txt"), ("arithmetic", "recipes/sums.txt")):
        documents = (folder / f"build/quickstart/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:200]
        text = "\n\n".join(json.loads(document)["text"] for document in documents)
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, line: str, *more: str) -> None:
    """Run one command line; `python` and `pangu-sigma` are this environment's."""
    words = shlex.split(line)
    program = [sys.executable, "-m", "pangu_sigma"] if words[0] == "pangu-sigma" else [sys.executable]
    done = subprocess.run(
        [*program, *words[1:], *more], cwd=folder, capture_output=True, text=True, env=environment(), timeout=600
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def environment() -> dict[str, str]:
    """This process's environment with the repository importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_every_command_of_the_readme_runs(folder):
    assert len(lines("README.md")) >= 3
    for line in lines("README.md"):
        run(folder, line, *(SHORT if line.startswith("pangu-sigma train ") else ()))


def test_the_configuration_of_the_readme_is_complete():
    (text,) = blocks("README.md", "yaml")
    config = load_config(yaml.safe_load(text))
    assert [domain.name for domain in config.domains] == ["letters", "recipes"] and config.model.sparse.layers


@pytest.mark.slow
def test_the_python_of_the_readme_runs(folder):
    (program,) = blocks("README.md", "python")
    (folder / "readme.py").write_text(program.replace('"train.steps": 200', '"train.steps": 40'), encoding="utf-8")
    run(folder, "python readme.py")


def test_every_command_of_the_first_steps_runs(folder):
    assert len(lines("docs/first_steps.md")) >= 8
    for line in lines("docs/first_steps.md"):
        run(folder, line)


@pytest.mark.parametrize("page", (*JOB_PAGES, *OTHER_PAGES))
def test_a_jobs_page_begins_with_its_command(page):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    beginning, language = re.match(r"# [^\n]+\n(.*?)```(\w*)\n", text, re.DOTALL).groups()
    assert language == "sh"
    assert len(beginning.split()) <= 40, "more than an introduction stands before the command"
    assert "pangu-sigma " in blocks(f"docs/{page}.md")[0]


@pytest.mark.slow
@pytest.mark.parametrize("page", JOB_PAGES[1:])
def test_the_first_commands_of_a_jobs_page_run_as_they_stand(page, folder):
    if not (folder / "runs/quickstart").exists():
        run(folder, "pangu-sigma train configs/quickstart.yaml", *SHORT)
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, words in (("python", ""), ("pangu-sigma", "-m pangu_sigma")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    path = {**environment(), "PATH": f"{programs}:{os.environ['PATH']}"}
    script = "set -e\n" + blocks(f"docs/{page}.md")[0]
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, env=path, timeout=1800)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
