"""`section.key=value` on the command line: changes of the mapping that a YAML file holds, before it is checked.

What is typed is read by the type of its key: a text key takes every character of it, a number is a number of YAML's,
and only where a list, a mapping or a section stands is it YAML. `null` alone is no value, whatever the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, NamedTuple, get_args, get_origin

import yaml

from pangu_sigma.config.key_descriptions import bare_type, choices_of, section_at, type_at
from pangu_sigma.config.section import Section
from pangu_sigma.config.validation_messages import unknown_key
from pangu_sigma.config.yaml_text import parse_scalar, parse_yaml
from pangu_sigma.errors import UserError, argument

# Key -> Python value; or texts as they are typed, section.key=value, and pairs of a key and a Python value.
Overrides = Mapping[str, Any] | Iterable[str | tuple[str, Any]]


class Change(NamedTuple):
    """One override: the path of its key, its value (`is_typed`: a text as it was typed), and how sentences show it."""

    path: str
    value: Any
    is_typed: bool
    text: str


def changes_of(overrides: Overrides) -> list[Change]:
    """The changes that overrides say, in their order. Python values are numbers (NumPy's too), texts, paths, None,
    lists and mappings of them. Raises UserError."""
    if isinstance(overrides, str):
        raise UserError(f"the overrides are one text, '{overrides}': give a mapping, {{'train.steps': 100}}, or a list")
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    return [_typed(item) if isinstance(item, str) else _given(*item) for item in items]


def _typed(text: str) -> Change:
    path, sign, value = text.partition("=")
    path = path.strip()
    if not sign or not path or not all(path.split(".")):
        raise UserError(f"the override '{text}' cannot be read: write section.key=value, for example train.steps=100")
    if not value.strip():
        raise UserError(f"the override '{text}' has no value: write {path}=null for no value")
    return Change(path, value, True, text)


def _given(path: str, value: Any) -> Change:
    text = _json(value, f"the override of {path}")
    return Change(path, json.loads(text), False, f"{path}={text}")


def plain_values(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A configuration that was made in Python, as a YAML file would give it; not yet checked. Raises UserError."""
    return json.loads(_json(dict(values), source))


def _json(value: Any, source: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain_value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source} holds what no configuration can hold ({error}): give numbers, texts, lists and mappings"
        ) from error


def _plain_value(value: Any) -> Any:
    """What JSON has in the place of a path, an array or scalar of NumPy."""
    if isinstance(value, PathLike):
        return fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(repr(value))


class Override(NamedTuple):
    """One override as typed and the key path that it sets, list items by their index."""

    text: str
    key: str


def known_section(key_path: list[str | int], text: str) -> dict[str, Any]:
    """A section of our configuration that the file leaves out, to be made by the override `text`.

    Raises UserError where `key_path` is none.
    """
    # `weights` of a phase is the one key whose value is a free mapping.
    if section_at(key_path) is None and key_path[-1] != "weights":
        raise UserError(f"override '{text}': {unknown_key(key_path)}")
    if section_at(key_path) is not None and key_path[-1] in ("domains", "phases", "examples"):
        raise UserError(
            f"the override '{text}' changes an item of {key_path[-1]}, but there is no such list: write it in the file"
        )
    return {}


def apply_overrides(
    values: dict[str, Any],
    overrides: Overrides,
    new_section: Callable[[list[str | int], str], dict[str, Any]] = known_section,
    root: Sequence[str] = (),
) -> list[Override]:
    """Set every override in `values` (in place), the later ones last; returns what was set, in order.

    A step into a list is an index or the `name` of an item: `domains.0.experts=2`, `domains.code.experts=2`. A missing
    section is what `new_section` makes of it. root: where our configuration begins in `values`; a key elsewhere has no
    type but that of its value now. Raises UserError if an override cannot be read or leads nowhere.
    """
    return [_apply(values, change, new_section, root) for change in changes_of(overrides)]


def _apply(
    values: dict[str, Any],
    change: Change,
    new_section: Callable[[list[str | int], str], dict[str, Any]],
    root: Sequence[str],
) -> Override:
    path, text = change.path, change.text
    key_path: list[str | int] = []
    target: Any = values
    *parents, last = path.split(".")
    for name in parents:
        step = _step(target, name, text)
        key_path.append(step)
        if isinstance(target, dict) and target.get(step) is None:
            target[step] = new_section(key_path, text)
        target = target[step]
    step = _step(target, last, text)
    key_path.append(step)
    if not change.is_typed:
        target[step] = change.value
    elif key_path[: len(root)] == list(root):
        target[step] = _read(change, type_at(key_path[len(root) :]))
    else:
        before = target.get(step) if isinstance(target, dict) else target[step]
        target[step] = _read(change, str if isinstance(before, str) else Any)
    return Override(text, ".".join(map(str, key_path)))


def _read(change: Change, annotation: Any) -> Any:
    """The value that is typed for a key of the type `annotation`; what is none of that type stays as it can be read,
    so that the check of the configuration says what is allowed."""
    typed, kind = change.value, bare_type(annotation)
    if typed == "null":
        return None
    if kind is str or typed in choices_of(kind):
        return typed
    is_section = isinstance(kind, type) and issubclass(kind, Section)
    of_texts = get_origin(kind) is tuple and bare_type(get_args(kind)[0]) is str  # a text may stand for a list of one
    if typed.lstrip().startswith(("[", "{")) or ((is_section or get_origin(kind) in (tuple, dict)) and not of_texts):
        try:
            return parse_yaml(typed)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if not of_texts:
                raise UserError(
                    f"the value of the override '{change.text}' is not YAML: write {change.path}=[a, b] or "
                    f"{change.path}={{key: value}}"
                ) from error
    return typed if of_texts else parse_scalar(typed)


def _step(target: Any, name: str, text: str) -> str | int:
    """The index or key that `name` means inside `target`."""
    if isinstance(target, dict):
        return name
    if not isinstance(target, list):
        raise UserError(f"the override '{text}' looks for '{name}' inside a single value: check its path")
    names = [item.get("name") if isinstance(item, dict) else None for item in target]
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(target):
        return int(name)
    known = ", ".join(str(known) for known in names if known is not None)
    raise UserError(
        f"the override '{text}' leads to no item: there are {len(target)} (counted from 0)"
        + (f", named {known}" if known else "")
    )


def emulation_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides that `train --emulate-mesh` stands for. Raises UserError where one of `overrides` differs."""
    implied = {"run.device": "CPU", "parallel.emulate_mesh": "true"}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in implied and value.strip().lower() != implied[key].lower():
            flag = argument("emulate_mesh", True)
            raise UserError(f"{flag} sets {key}={implied[key]}: leave out {flag} or {override}")
    return [f"{key}={value}" for key, value in implied.items()]


def stream_overrides(source: str | None, domain: str | None, domain_field: str | None) -> list[tuple[str, str]]:
    """The overrides that `train --stream SOURCE --domain … --domain-field …` stands for. Raises UserError."""
    if domain is not None and domain_field is not None:
        raise UserError(
            f"{argument('domain')} and {argument('domain_field')} exclude each other: give the one domain of all "
            "documents, or the field that names each one's"
        )
    given = {"path": source, "domain": domain, "domain_field": domain_field}
    if source is None and (domain is not None or domain_field is not None):
        raise UserError(
            f"{argument('domain')} and {argument('domain_field')} say whose the documents of a stream are: add "
            f"{argument('stream', 'SOURCE')}"
        )
    return [(f"data.stream.{key}", value) for key, value in given.items() if value is not None]
