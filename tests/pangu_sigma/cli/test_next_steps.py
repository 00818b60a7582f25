"""The commands that a job proposes exist, and carry the place of what was made."""

from __future__ import annotations

import shlex

import pytest
from typer.main import get_command

from pangu_sigma.cli import app
from pangu_sigma.cli.next_steps import _NEXT, next_steps


@pytest.mark.parametrize("kind", _NEXT)
def test_every_proposed_command_can_be_parsed(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = ["sft", "my model", "a b.yaml"]
    first, *commands = next_steps(kind, tmp_path / "my run", ["code", "law"], again).splitlines()
    assert "is in 'my run'." in first
    for line in commands:
        program, *words = shlex.split(line)
        command = get_command(app)
        assert program == "pangu-sigma"
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words, resilient_parsing=False)


def test_a_domain_is_named_where_there_is_a_choice(tmp_path):
    assert "--domain" not in next_steps("model", tmp_path, ["code"])
    assert "--domain code" in next_steps("model", tmp_path, ["code", "law"])
