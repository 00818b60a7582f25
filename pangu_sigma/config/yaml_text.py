"""YAML reader and writer, by the rules of YAML 1.2's core schema; the only reader of untrusted YAML.

PyYAML's own loader follows YAML 1.1, where `1e-4` is a text, `no` is false and `010` is eight. A configuration must not
depend on knowing that. It also expands aliases without end, takes the last of two equal keys and fails in many ways at
tags. Here bytes, depth and values are bounded while the text is read, an alias counting as all that it stands for, and
whatever the text holds, a value comes back or `UnreadableText` says what is wrong and where.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pangu_sigma.json_reader import UnreadableText, decoded, has_half_pair

MOST_BYTES = 4 << 20
_MOST_VALUES = 100_000  # PyYAML takes 50 µs for each; a domain of an effective configuration has 30
_DEEPEST = 64
_LONGEST_NUMBER = 1000  # characters, of a date too; converting takes the square of them
_LONGEST_KEY = 1000
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_TAG = "tag:yaml.org,2002:"
_EXPONENT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _BoundedLoader(yaml.SafeLoader):
    """Plain values only, and no more of them than a configuration has. Raises UnreadableText with the line."""

    yaml_constructors = {  # no bytes, sets or pairs; a constructor of a wrong tag says so
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in (*_PLAIN, "timestamp")
    }

    any_number = False  # whole numbers beyond 64 bits too

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._values = 0, 0
        self._sizes: dict[str, int] = {}  # anchor -> values that it stands for

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Counts a value while it is read: before its alias is expanded, before it is built."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _refusal(f"not valid YAML (*{event.anchor[:60]} stands inside what it names)", event.start_mark)
            self._count(self._sizes.get(event.anchor, 1), event.start_mark)
            return super().compose_node(parent, index)
        if self._depth == _DEEPEST:
            raise _refusal(f"nested more than {_DEEPEST} levels deep, which no such text needs", event.start_mark)
        before = self._values
        self._count(1, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and has_half_pair(node.value):
            raise _refusal("not valid YAML (a text holds half a surrogate pair)", node.start_mark)
        if event.anchor is not None:
            self._sizes[event.anchor] = self._values - before
        return node

    def _count(self, values: int, mark: yaml.Mark) -> None:
        self._values += values
        if self._values > _MOST_VALUES:
            raise _refusal(f"larger than {_MOST_VALUES:,} values with its aliases, which no such text needs", mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A node's value; PyYAML's constructors raise many kinds of errors for a text that does not fit its tag."""
        kind = node.tag.removeprefix(_TAG)
        is_number = isinstance(node, yaml.ScalarNode) and kind in ("int", "float", "timestamp")
        try:
            if is_number and len(node.value) > _LONGEST_NUMBER:
                raise ValueError
            value = super().construct_object(node, deep)
            # Our own configuration says by the key what is allowed there; other programs' files are not checked so.
            if type(value) is int and not (self.any_number or -(1 << 63) <= value < 1 << 64):
                raise ValueError
        except (yaml.YAMLError, UnreadableText):
            raise
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, ArithmeticError):
            shown = ascii(node.value[:40]) if isinstance(node, yaml.ScalarNode) else f"this {node.id}"
            raise _refusal(f"not valid YAML ({shown} is no {kind} that can be read)", node.start_mark) from None
        return value


class _CoreLoader(_BoundedLoader):
    """YAML 1.2's core schema."""

    any_number = True
    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors = {
        tag: construct for tag, construct in _BoundedLoader.yaml_constructors.items() if tag != f"{_TAG}timestamp"
    }

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[str, Any]:
        """A mapping whose keys are texts as written (`2024:` is the key "2024"), each at most once."""
        if not isinstance(node, yaml.MappingNode):
            raise _refusal("not valid YAML (expected a mapping)", node.start_mark)
        _check_keys(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


class _Loader11(_BoundedLoader):
    """YAML 1.1, as PyYAML and with it MindFormers read it; an alias is one object in several places."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[str, Any]:
        """A mapping; `<<` merges others into it."""
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return super().construct_mapping(node, deep)


def _check_keys(node: yaml.MappingNode) -> None:
    """Raises UnreadableText for a key that is no plain text, or that is written twice."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or len(key.value) > _LONGEST_KEY:
            raise _refusal("not valid YAML (a key must be a plain, short text)", key.start_mark)
        if key.value in seen:
            raise _refusal(f"the key '{key.value[:60]}' is written twice", key.start_mark)
        seen.add(key.value)


def _refusal(problem: str, mark: yaml.Mark | None) -> UnreadableText:
    return UnreadableText(problem, None if mark is None else mark.line + 1)


_CoreLoader.add_implicit_resolver(_TAG + "null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_CoreLoader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_CoreLoader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_CoreLoader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)
_CoreLoader.add_constructor(_TAG + "int", lambda loader, node: int(node.value))
_CoreLoader.add_constructor(
    _TAG + "float", lambda loader, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
)
_CoreLoader.add_constructor(_TAG + "map", _CoreLoader.construct_mapping)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read back as a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str | bytes) -> Any:
    """The value that a YAML text holds (mappings, lists and scalars). Raises UnreadableText."""
    return _unshared(_load(text, _CoreLoader))


def parse_yaml_11(text: str | bytes) -> Any:
    """The value that a text of YAML 1.1 holds, as `parse_yaml`; each alias is one object in several places."""
    return _load(text, _Loader11)


def _load(text: str | bytes, kind: type[_BoundedLoader]) -> Any:
    text = decoded(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"), MOST_BYTES)
    loader = None
    try:
        loader = kind(text)
        return loader.get_single_data()
    except UnreadableText:
        raise
    except yaml.reader.ReaderError as error:
        raise UnreadableText(f"not valid YAML ({error.reason})", text.count("\n", 0, error.position) + 1) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise _refusal(f"not valid YAML ({problem})", mark) from None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:  # of escapes, of directives
        mark = None if loader is None else loader.get_mark()
        raise _refusal(f"not valid YAML ({ascii(str(error))[1:-1]})", mark) from None


def parse_scalar(text: str) -> Any:
    """The null, truth value, number or text that a YAML file has where exactly this stands as a plain value; nothing in
    it is syntax."""
    text = text.strip()
    loader = _CoreLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError:
        return text
    finally:
        loader.dispose()


def _unshared(value: Any) -> Any:
    """A copy without shared parts: changing one use of a YAML anchor must not change the others."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def dump_yaml(value: Any) -> str:
    """YAML text of plain mappings, lists and scalars in their own order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
