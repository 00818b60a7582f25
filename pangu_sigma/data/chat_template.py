"""Chat template: turns a conversation into a text. The models are no assistants: they continue it."""

from __future__ import annotations

from collections.abc import Sequence

# Where the next turn of somebody else would begin, the answer is over.
STOPS = ("\nUser:", "\nSystem:")
_SPEAKERS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


def as_text(turns: Sequence[tuple[str, str]]) -> str:
    """`User: …`, a line for each turn (role: system, developer, user or assistant; text), and `Assistant:` at the end;
    an assistant's last turn is continued instead."""
    lines = [f"{_SPEAKERS[role]}: {text}" for role, text in turns]
    if turns[-1][0] != "assistant":
        lines.append("Assistant:")
    return "\n".join(lines)
