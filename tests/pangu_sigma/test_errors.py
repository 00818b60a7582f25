"""Messages name arguments as whoever called writes them: as Python's, or as flags of the command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pangu_sigma.errors import SPELLING, argument, arguments_as_flags, spelled_as

ROOT = Path(__file__).parents[2]
# Texts that are no messages: command lines of processes and pages, and what only the command line prints.
NO_MESSAGES = {
    "pangu_sigma/doctor/check_processes.py", "pangu_sigma/doctor/machine_checks.py", "pangu_sigma/training/job.py",
    "pangu_sigma/evaluation/evaluation_job.py", "pangu_sigma/workers.py", "pangu_sigma/config/config_text.py",
    "pangu_sigma/domains/group_size_advice.py", "pangu_sigma/new_configuration.py", "pangu_sigma/errors.py",
    "extract/sub_model_card.py", "extract/export/export_formats.py", "pangu_sigma/generation/prompts.py",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "python", "flags"),
    [
        ("top_k", None, "top_k", "--top-k"), ("noise", 1, "noise=1", "--noise 1"), ("top", 5, "top=5", "--top 5"),
        ("resume", True, "resume=True", "--resume"),
        ("verify", False, "verify=False", "--no-verify"), ("pieces", Path("a.txt"), "pieces='a.txt'", "--pieces a.txt"),
    ],
)  # fmt: skip
def test_an_argument_is_spelled_as_its_caller_does(name, value, python, flags, monkeypatch):
    assert argument(name, value) == python
    with arguments_as_flags():
        assert argument(name, value) == flags and spelled_as() == {}
    monkeypatch.setenv(SPELLING, spelled_as()[SPELLING])  # of a worker that a Python program started
    with arguments_as_flags():
        assert argument(name, value) == python


def test_no_message_names_a_flag_by_itself():
    flag = re.compile(r"(?<![\w(-])--[a-z]")
    found = []
    for folder in ("pangu_sigma", "rre", "parallel", "extract"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name in NO_MESSAGES or name.startswith(("pangu_sigma/cli/", "extract/export/hf_files", "parallel/dry")):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
            docstrings = {id(item.value) for body in bodies for item in body if isinstance(item, ast.Expr)}
            found += [
                f"{name}:{node.lineno}: {node.value}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and flag.search(node.value)
                and id(node) not in docstrings
            ]  # fmt: skip
    assert not found
