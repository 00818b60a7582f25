"""What every domain came to beside what a count of its tokens knows, in nats per token and bits per byte, and what it
takes up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pangu_sigma.monitor.printable_text import compact
from pangu_sigma.monitor.text_tables import number

HEADER = (
    "domain", "unigram", "learned", "end", "under unigram", "unigram bits/byte", "end bits/byte", "parameters", "size"
)  # fmt: skip


@dataclass(frozen=True)
class DomainFloor:
    """One domain. unigram, learned, end: nats per token of a unigram model, right after its stage and at the end, on
    the same held-out text; None where nothing was measured. The bits are per UTF-8 byte of that text. parameters and
    bytes: what the model has for this domain alone, without optimizer state."""

    name: str
    unigram: float | None
    learned: float | None
    end: float | None
    unigram_bits_per_byte: float | None
    end_bits_per_byte: float | None
    parameters: int | None
    bytes: int | None

    @property
    def warning(self) -> str | None:
        """A sentence where the domain ended above its unigram model."""
        if self.unigram is None or self.learned is None or self.end is None or self.end <= self.unigram:
            return None
        return (
            f"{self.name} ends at {number(self.end)} nats per token, and a count of its tokens reaches "
            f"{number(self.unigram)}: give it more steps, words of its own (model.domain_parameters.embedding: own), "
            "or let the shared parameters train"
        )

    def row(self) -> list[str]:
        """As text, under HEADER."""
        under = None if self.unigram is None or self.end is None else self.unigram - self.end
        losses = [number(self.unigram), number(self.learned), number(self.end), number(under, sign=True)]
        bits = [number(self.unigram_bits_per_byte), number(self.end_bits_per_byte)]
        sizes = ["–" if self.parameters is None else compact(self.parameters),
                 "–" if self.bytes is None else f"{compact(self.bytes)}B"]  # fmt: skip
        return [self.name, *losses, *bits, *sizes]


def bits_per_byte(loss: float | None, tokens: int, text_bytes: int | None) -> float | None:
    """Nats per token as bits per byte of the `tokens` that were measured, which are a text of so many bytes."""
    return None if loss is None or not tokens or not text_bytes else loss * tokens / text_bytes / math.log(2)


def domain_floors(
    learned: Mapping[str, int | None],
    rows: Sequence[Mapping[str, Mapping]],
    unigram: Mapping[str, float],
    heldout_bytes: Mapping[str, int],
    costs: Mapping[str, Mapping[str, int]],
) -> list[DomainFloor]:
    """Of every domain, from the rows of the finished stages; the rest as in `Results`."""
    floors = []
    for name, stage in learned.items():
        # The tokens of a row that measured it: every row measures the same ones.
        tokens = max((row[name]["tokens"] for row in rows), default=0)
        end = rows[-1][name]["loss"] if rows else None
        text_bytes, loss, cost = heldout_bytes.get(name), unigram.get(name), costs.get(name, {})
        floors.append(
            DomainFloor(
                name=name,
                unigram=loss,
                learned=rows[stage][name]["loss"] if stage is not None and stage < len(rows) else None,
                end=end,
                unigram_bits_per_byte=bits_per_byte(loss, tokens, text_bytes),
                end_bits_per_byte=bits_per_byte(end, tokens, text_bytes),
                parameters=cost.get("parameters"),
                bytes=cost.get("bytes"),
            )
        )
    return floors
