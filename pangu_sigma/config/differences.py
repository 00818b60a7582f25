"""Keys in which two effective configurations differ, each with what its field says of `--resume` and `init_from`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pangu_sigma.config.key_descriptions import inner_section
from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import Section
from pangu_sigma.wording import shown


class Difference(NamedTuple):
    """One key with its values in two configurations, None where one does not have it."""

    key: str
    before: Any
    after: Any
    resume: str
    init_from: str

    def __str__(self) -> str:
        return f"{self.key} was {shown(self.before)} and is {shown(self.after)}"


def differences(before: Config, after: Config) -> list[Difference]:
    """Every key whose value is not the same; items that have a name are named (`domains.code.experts`), and the list of
    their names is a key too (`domains`), because ids are positions."""
    old, new = dict(_settings(before)), dict(_settings(after))
    result = []
    for key, (_, *decisions) in {**old, **new}.items():
        values = [settings[key][0] if key in settings else None for settings in (old, new)]
        if values[0] != values[1]:
            result.append(Difference(key, *values, *decisions))
    return result


def _settings(section: Section, prefix: str = "") -> Iterator[tuple[str, tuple[Any, str, str]]]:
    """Key path -> value, what `--resume` and what `init_from` may do with it."""
    for name, field in type(section).model_fields.items():
        value, path = getattr(section, name), f"{prefix}{name}"
        inner, is_list = inner_section(field)
        is_named = is_list and inner is not None and "name" in inner.model_fields
        if isinstance(value, Section):
            yield from _settings(value, f"{path}.")
        elif inner is not None and is_list:
            items = {item.name if is_named else str(index): item for index, item in enumerate(value)}
            for item_name, item in items.items():
                yield from _settings(item, f"{path}.{item_name}.")
            value = tuple(items)
        if is_named or inner is None:
            yield path, (value, *section.decisions_of(name))


def joined(sentences: Sequence[object]) -> str:
    """The first five of the sentences, and how many more there are."""
    more = f"; and {len(sentences) - 5} more" if len(sentences) > 5 else ""
    return "; ".join(map(str, sentences[:5])) + more
