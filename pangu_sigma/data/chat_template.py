"""The plain template that turns a conversation into a text. The models are no assistants: they continue it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pangu_sigma.serving.openai_requests import Message

# Where the next turn of somebody else would begin, the answer is over.
STOPS = ("\nUser:", "\nSystem:")
_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Turn:
    """What somebody says: `role` system, developer, user or assistant."""

    role: str
    text: str


def as_text(messages: Sequence[Message | Turn]) -> str:
    """`User: …`, a line a turn, and `Assistant:` at the end; an assistant's last turn is continued instead."""
    turns = [f"{_NAMES[message.role]}: {message.text}" for message in messages]
    if messages[-1].role != "assistant":
        turns.append("Assistant:")
    return "\n".join(turns)
