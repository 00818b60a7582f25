"""Dropped documents of a domain: how many for which reason, and a few examples of each that a person can look up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pangu_sigma.config.data_section import DomainConfig
from pangu_sigma.data.corpus_files import Document
from pangu_sigma.data.document_filters import REASONS, RULES

EXAMPLES = 3  # of each reason
_SHOWN_CHARS = 40  # of an example's text
# Reasons beside those of the filters, with the words that people read.
_OTHERS = {"empty": "empty", "exact": "exact duplicates", "near": "near duplicates"}
# A domain that lost more than this share of its documents is warned of.
MUCH = 0.5


@dataclass
class DroppedDocuments:
    """Counts and examples by reason: `empty`, `exact`, `near`, and those of `document_filters.REASONS` that apply.

    An example says where the document begins ("code.jsonl:12"), how its text begins, and of what it is a copy.
    """

    counts: dict[str, int]
    examples: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def none_yet(cls, source: DomainConfig) -> DroppedDocuments:
        """No document, of a domain whose rules are known: each reason that can occur has a count of 0."""
        rules = [r for r in RULES[source.filters] if r != "few_stars" or source.stars_field is not None]
        return cls(dict.fromkeys((*rules, *_OTHERS), 0))

    def add(self, reason: str, document: Document, original: str | None = None) -> None:
        """Count a document; `original`: where that is of which it is a copy."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            text = " ".join(document.text[: 4 * _SHOWN_CHARS].split())
            shown = text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"
            where = place(document) + (f" '{shown}'" if shown else "")
            examples.append(f"{where} of {original}" if original else where)

    @property
    def total(self) -> int:
        """Documents in all."""
        return sum(self.counts.values())

    def sentences(self, name: str, kept: int) -> Iterator[str]:
        """What became of the documents of a domain of which `kept` were kept, then examples; nothing where none could
        be dropped by a filter and none was."""
        counts = [f"{n:,} {_words(r)}" for r, n in self.counts.items() if n or r in REASONS]
        if counts:
            yield f"{name}: {kept:,} documents kept; dropped: {', '.join(counts)}"
        for reason, examples in self.examples.items():
            yield f"{name}: {_words(reason)}, for example {', '.join(examples)}"

    def warning(self, name: str, kept: int) -> str | None:
        """The sentence on a domain that lost much of its text, with the key that says so; None for others."""
        share = self.total / max(self.total + kept, 1)
        if share <= MUCH:
            return None
        return f"domain '{name}' lost {share:.0%} of its documents ({self._most()}): {self.advice(name)}"

    def advice(self, name: str) -> str:
        """What to change so that fewer documents of a domain are dropped."""
        reason = max(self.counts, key=self.counts.__getitem__)
        keys = {
            "empty": f"look whether text_field of '{name}' names the text",
            "exact": "set data.deduplicate to none if copies are wanted",
            "near": "set data.deduplicate to exact if they are no copies",
        }
        return keys.get(reason, f"set filters of '{name}' to none if they are wanted")

    def _most(self) -> str:
        return ", ".join(f"{n:,} {_words(r)}" for r, n in self.counts.items() if n)

    @classmethod
    def stored(cls, counts: Mapping[str, int], examples: Mapping[str, list[str]]) -> DroppedDocuments:
        """What `store.json` keeps. Raises ValueError, TypeError or AttributeError for anything else."""
        return cls(
            {str(reason): int(count) for reason, count in counts.items()},
            {str(reason): [str(example) for example in some] for reason, some in examples.items()},
        )


def place(document: Document) -> str:
    """Where a document begins: its file's name and line."""
    return f"{document.file.name}:{document.line}"


def _words(reason: str) -> str:
    return REASONS.get(reason) or _OTHERS.get(reason, reason)
