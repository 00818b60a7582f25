"""Numbers and names as short text that is safe to print."""

import math


def printable(text: str) -> str:
    """The text on one line without control characters: names come from files and must not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


def shortened(text: str, most: int) -> str:
    """The text as `printable`, with … for what is beyond `most` characters."""
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def printable_lines(text: str) -> str:
    """Like `printable`, but line breaks stay."""
    return "\n".join(printable(line) for line in text.expandtabs().split("\n"))


def compact(value: float) -> str:
    """A count in at most about five characters: 950, 1.2k, 34.5M, 2.1G, 7.0T, 3.1P."""
    if not math.isfinite(value):
        return str(value)
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.99995:
            return f"{value / factor:.1f}{unit}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 3:07, 2:05:09 or 3 d 04:10 (days, hours, minutes)."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    total_seconds = round(seconds)
    minutes, second = divmod(total_seconds, 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
