"""The doctor's table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pangu_sigma.doctor.check_results import Check, Status, healthy
from pangu_sigma.monitor.printable_text import printable
from pangu_sigma.monitor.text_tables import text_table


def text(checks: Sequence[Check]) -> str:
    """One row a check, then what to do about all that did not pass, then the verdict."""
    table = text_table(["check", "", "found"], [[c.name, c.status.value, c.found] for c in checks], left=3)
    todo = [f"{check.name}: {printable(check.advice)}" for check in checks if check.advice]
    count = sum(check.status is Status.failed for check in checks)
    verdict = "All that this machine has works." if healthy(checks) else f"{count} of {len(checks)} checks failed."
    return "\n\n".join(filter(None, [table, "\n".join(todo), verdict]))
