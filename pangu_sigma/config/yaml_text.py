"""YAML reader and writer, by the rules of YAML 1.2's core schema, with duplicate keys refused.

PyYAML's own loader follows YAML 1.1, where `1e-4` is a text, `no` is false and `010` is eight. A configuration must not
depend on knowing that.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_EXPONENT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[str, Any]:
        """A mapping whose keys are texts as written (`2024:` is the key "2024"), each at most once."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain text", key_node.start_mark)
            if key_node.value in mapping:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' is written twice", key_node.start_mark
                )
            mapping[key_node.value] = self.construct_object(value_node, deep=True)
        return mapping


_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)
_Loader.add_constructor(_TAG + "int", lambda loader, node: int(node.value))
_Loader.add_constructor(
    _TAG + "float", lambda loader, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
)
_Loader.add_constructor(_TAG + "map", _Loader.construct_mapping)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read back as a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds (mappings, lists and scalars).

    Raises yaml.YAMLError on a syntax error, a duplicate key, an unknown tag, and ValueError on a scalar that does not
    fit its tag.
    """
    return _unshared(yaml.load(text, Loader=_Loader))  # a subclass of SafeLoader: builds plain values only


def parse_scalar(text: str) -> Any:
    """The null, truth value, number or text that a YAML file has where exactly this stands as a plain value; nothing in
    it is syntax."""
    text = text.strip()
    loader = _Loader("")
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
