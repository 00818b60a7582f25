"""Chat template: turns a conversation into a text. The models are no assistants: they continue it."""

from __future__ import annotations

from collections.abc import Sequence

_SPEAKERS = {
    "system": "System",
    "developer": "System",
    "user": "User",
    "assistant": "Assistant",
    "tool": "Tool",
    "function": "Tool",
}


def stops(turns: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Where the next turn of somebody else would begin, the answer is over: of a tool only where one has spoken."""
    others = dict.fromkeys(["User", "System", *(_SPEAKERS[role] for role, _ in turns)])
    return tuple(f"\n{speaker}:" for speaker in others if speaker != "Assistant")


def as_text(turns: Sequence[tuple[str, str]]) -> str:
    """`User: …`, a line for each turn (a role of `_SPEAKERS` and a text), and `Assistant:` at the end;
    an assistant's last turn is continued instead."""
    lines = [f"{_SPEAKERS[role]}: {text}" for role, text in turns]
    if turns[-1][0] != "assistant":
        lines.append("Assistant:")
    return "\n".join(lines)
