"""Chat template: turns a conversation into a text. The models are no assistants: they continue it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Where the next turn of somebody else would begin, the answer is over.
STOPS = ("\nUser:", "\nSystem:")
_SPEAKERS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


class HasRoleAndText(Protocol):
    """What the template reads of one turn of a conversation."""

    @property
    def role(self) -> str:
        """system, developer, user or assistant."""

    @property
    def text(self) -> str:
        """Its text."""


@dataclass(frozen=True)
class ChatTurn:
    """One turn of a conversation: `role` system, developer, user or assistant."""

    role: str
    text: str


def as_text(turns: Sequence[HasRoleAndText]) -> str:
    """`User: …`, a line a turn, and `Assistant:` at the end; an assistant's last turn is continued instead."""
    lines = [f"{_SPEAKERS[turn.role]}: {turn.text}" for turn in turns]
    if turns[-1].role != "assistant":
        lines.append("Assistant:")
    return "\n".join(lines)
