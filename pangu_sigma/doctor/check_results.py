"""One row of the doctor's table, and where it stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class Status(StrEnum):
    """Outcome of a check."""

    passed = "pass"
    failed = "fail"
    skipped = "skipped"


@dataclass(frozen=True)
class Check:
    """`name` of what was looked at, what was `found`, and for all that did not pass what to do (`advice`)."""

    name: str
    status: Status
    found: str
    advice: str = ""


def passed(name: str, found: str) -> Check:
    """A check that passed."""
    return Check(name, Status.passed, found)


def failed(name: str, found: str, advice: str) -> Check:
    """A check that failed, with what to do."""
    return Check(name, Status.failed, found, advice)


def skipped(name: str, reason: str, advice: str = "") -> Check:
    """A check that this machine gives no occasion for, with the reason."""
    return Check(name, Status.skipped, reason, advice)


def healthy(checks: Iterable[Check]) -> bool:
    """Whether no check failed."""
    return all(check.status is not Status.failed for check in checks)


def as_json(checks: Iterable[Check]) -> dict[str, object]:
    """The checks for scripts: whether none failed, and every row."""
    rows = list(checks)
    return {"healthy": healthy(rows), "checks": [asdict(check) for check in rows]}
