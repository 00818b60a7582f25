"""Reference of every key of the schema: allowed values, default and meaning, for errors and `config --describe`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from pangu_sigma.config.schema import Config
from pangu_sigma.config.section import Section

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_BOUNDS = {"ge": "of at least", "gt": "greater than", "le": "at most", "lt": "less than"}
_PATTERN_TEXT = "of small letters, digits, '_' and '-', starting with a letter or digit, at most 64 long"


class KeyDescription(NamedTuple):
    """One key of the schema; `[]` in the path stands for an item of a list. resume, init_from: keys of
    `section.RESUME` and `section.INIT_FROM`."""

    path: str
    allowed: str
    default: str
    description: str
    resume: str
    init_from: str


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[KeyDescription]:
    """Every key that holds a value, in the schema's order."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        inner, is_list = inner_section(field)
        if inner is not None:
            yield from keys(inner, f"{path}[]." if is_list else f"{path}.")
        else:
            yield KeyDescription(path, allowed(field), default_of(field), meaning(field), *section.decisions_of(name))


def meaning(field: FieldInfo) -> str:
    """What a field is for: its description, or the first sentences of its section."""
    inner, _ = inner_section(field)
    return " ".join((field.description or (inner.__doc__ if inner else "")).split())


def allowed(field: FieldInfo) -> str:
    """What a field accepts, in words: "a whole number of at least 1, or null"."""
    return _allowed(field.annotation, field.metadata)


def section_at(path: Sequence[str | int], root: type[Section] = Config) -> type[Section] | None:
    """The section of `root` that a key path leads to, or None."""
    section: type[Section] | None = root
    for step in path:
        if not isinstance(step, int):
            field = section.model_fields.get(step) if section is not None else None
            section = inner_section(field)[0] if field is not None else None
    return section


def field_at(path: Sequence[str | int], root: type[Section] = Config) -> FieldInfo | None:
    """The field of `root` at a key path, or None where it leads to no field of its own (an item, a mapping's key)."""
    section = section_at(path[:-1], root) if path else None
    return section.model_fields.get(path[-1]) if section is not None else None


def type_at(path: Sequence[str | int], root: type[Section] = Config) -> Any:
    """The annotation of the value at a key path of `root`; also for items of lists and values of mappings. `Any` where
    the schema has no such key."""
    field = field_at(path, root)
    if field is not None:
        return field.annotation
    parent = field_at(path[:-1], root)
    arguments = get_args(bare_type(parent.annotation)) if parent is not None else ()
    return arguments[0 if isinstance(path[-1], int) else -1] if arguments else Any


def allowed_at(path: Sequence[str | int], root: type[Section] = Config) -> str:
    """What is allowed at a key path of `root`; also for items of lists and values of mappings."""
    field = field_at(path, root)
    if field is not None:
        return allowed(field)
    annotation = type_at(path, root)
    return "a value of the schema" if annotation is Any else _allowed(annotation, [])


def inner_section(field: FieldInfo) -> tuple[type[Section] | None, bool]:
    """The section inside a field and whether it is an item of a list."""
    bare = bare_type(field.annotation)
    is_list = get_origin(bare) is tuple
    bare = bare_type(get_args(bare)[0]) if is_list else bare
    return (bare, is_list) if isinstance(bare, type) and issubclass(bare, Section) else (None, is_list)


def bare_type(annotation: Any) -> Any:
    """The type in an annotation, without null and what else is said about it."""
    if get_origin(annotation) in (Union, types.UnionType):
        return bare_type(next(argument for argument in get_args(annotation) if argument is not type(None)))
    return bare_type(get_args(annotation)[0]) if hasattr(annotation, "__metadata__") else annotation


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values of a type that lists them, else none."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _allowed(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return f"{_allowed(next(argument for argument in arguments if argument is not type(None)), metadata)}, or null"
    if hasattr(annotation, "__metadata__"):
        return _allowed(arguments[0], [*metadata, *arguments[1:]])
    if origin is Literal:
        *choices, last = [json.dumps(choice).strip('"') for choice in arguments]
        return f"{', '.join(choices)} or {last}" if choices else last
    if origin is tuple:
        at_least = " of at least one item" if _bound(metadata, "min_length") else ""
        return f"a list{at_least}, each {_allowed(arguments[0], [])}"
    if origin is dict:
        return f"a mapping, each value {_allowed(arguments[1], [])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a mapping with the keys {', '.join(annotation.model_fields)}"
    return _PLAIN.get(annotation, "a value") + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    bounds = {words: _bound(metadata, name) for name, words in _BOUNDS.items()}
    parts = [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]
    if _bound(metadata, "pattern") is not None:
        parts.append(_PATTERN_TEXT)
    elif _bound(metadata, "min_length") is not None:
        parts.append("that is not empty")
    return (" " + " and ".join(parts)) if parts else ""


def _bound(metadata: Sequence[Any], name: str) -> Any:
    return next((value for item in metadata if (value := getattr(item, name, None)) is not None), None)


def default_of(field: FieldInfo) -> str:
    """The default of a field as YAML, or "required"."""
    if field.is_required():
        return "required"
    return json.dumps(to_jsonable_python(field.get_default())).strip('"')
