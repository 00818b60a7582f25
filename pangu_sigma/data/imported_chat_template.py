"""Chat template that came with an imported model: Jinja of a foreign file, rendered in a sandbox whose work is bounded.

As transformers renders it (`apply_chat_template`): the same names, filters and whitespace rules. A template is data of
somebody else's: it reaches no attribute of Python's objects, its loops, calls, texts and numbers are counted, and what
it may call is listed. A single step on a large list of its own making is not interrupted.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import UnreadableText, parse_object

_MOST_TEMPLATE = 256 << 10  # characters of a template
_MOST_TEXT = 4 << 20  # characters that a template makes, in whole and in any text on the way
_MOST_ROUNDS = 50_000  # rounds of all loops, and calls, together
_MOST_SECONDS = 2.0  # looked at with each of them
_MOST_ITEMS = 20_000  # of a list that becomes text, those inside its items included
_FILTERS = frozenset(
    """abs capitalize count d default dictsort e escape first float groupby indent int items join last length list lower
    map max min reject rejectattr replace reverse round safe select selectattr sort string strip title tojson trim
    unique upper""".split()  # noqa: SIM905 - a list of words
)
# Methods of texts that make one of any length.
_UNBOUNDED = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill", "translate"})
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


# What Python raises in a template's code.
_FAILURES = (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


class _TooMuch(TemplateError):
    """A bound of the sandbox is reached."""


class _Refused(TemplateError):
    """The template itself refuses the conversation."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja without what makes texts of any length or asks Python's objects; it counts loops and calls.

    `counted` and `joined` stand in compiled templates (see `_Bounded`); no name of a template's own can hide them.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=_printable
        )
        self._of_thread = threading.local()
        self.filters = {name: filter_ for name, filter_ in self.filters.items() if name in _FILTERS}
        self.filters |= {
            "tojson": _to_json, "replace": _replaced, "join": _joined_by, "string": _text, "indent": _indented
        }  # fmt: skip
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _raise, "strftime_now": _time_now}

    def begin(self) -> None:
        """Count anew, in this thread."""
        self._of_thread.rounds, self._of_thread.end = _MOST_ROUNDS, time.monotonic() + _MOST_SECONDS

    def take_round(self) -> None:
        """A round of a loop, or a call."""
        self._of_thread.rounds -= 1
        if self._of_thread.rounds < 0:
            raise _TooMuch(f"more than {_MOST_ROUNDS:,} rounds of its loops and calls")
        if time.monotonic() > self._of_thread.end:
            raise _TooMuch(f"more than {_MOST_SECONDS:g} s")

    def counted(self, items: Iterable[Any]) -> _Counted:
        """What a loop goes through."""
        return _Counted(self, items if hasattr(items, "__len__") else list(items))

    def joined(self, *values: Any) -> str:
        """Texts one behind the other."""
        texts = [_text(value) for value in values]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def wrap_str_format(self, value: Any) -> None:
        """No text's `format` and `format_map`: a width may be of any size."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNBOUNDED and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *arguments: Any, **named: Any) -> Any:
        self.take_round()
        text = getattr(obj, "__self__", None)
        if isinstance(text, str) and obj.__name__ == "replace":
            return _replaced(text, *arguments, **named)
        if isinstance(text, str) and obj.__name__ == "join":
            return _joined_by(*arguments, text)
        return super().call(context, obj, *arguments, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(value, (int, float)) for value in (left, right))
        if operator == "+" and not numbers:
            _check_size(sum(len(value) for value in (left, right) if hasattr(value, "__len__")))
        elif operator != "+" and not (numbers and all(abs(value) < 1e9 for value in (left, right))):
            raise _TooMuch(f"the operator {operator} takes numbers below 1e9 here")
        elif operator == "**" and abs(right) > 64:
            raise _TooMuch("a power beyond 64")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}`, which marks an assistant's text for trainings and writes what is inside."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(NodeTransformer):
    """Lets every loop count its rounds, and every joined text its length."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _call("counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes)


class _Counted:
    """Items of which each takes a round of the sandbox's."""

    def __init__(self, sandbox: _Sandbox, items: Collection[Any]) -> None:
        self._sandbox, self._items = sandbox, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._sandbox.take_round()
            yield item


class ImportedChatTemplate:
    """A chat template of Jinja. special: names (bos_token, …) -> the pieces that it may write.

    Raises UserError for one that is too long or cannot be read.
    """

    def __init__(self, text: str, special: Mapping[str, str]) -> None:
        self.special = dict(special)
        if len(text) > _MOST_TEMPLATE:
            raise UserError(
                f"the model's chat template has {len(text):,} characters, and at most {_MOST_TEMPLATE:,} are read: "
                "import the model with a shorter one"
            )
        self._sandbox = sandbox = _Sandbox()
        try:
            tree = _Bounded().visit(sandbox.parse(text))
            self._template = Template.from_code(sandbox, sandbox.compile(tree, "chat template"), sandbox.globals)
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise UserError(
                f"the model's chat template cannot be read ({error}): repair it in the folder that the model came "
                "from, and import it again"
            ) from error

    def render(self, turns: Sequence[tuple[str, str]]) -> str:
        """The conversation of (role, text) as the model reads it, up to where its answer begins; an assistant's last
        turn is continued.

        Raises UserError where the template refuses it, or asks too much.
        """
        self._sandbox.begin()
        continued = turns[-1][0] == "assistant"
        messages = [{"role": role, "content": text} for role, text in turns]
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=not continued, tools=None, documents=None, **self.special
            ):
                length += len(piece)
                _check_size(length)
                pieces.append(piece)
        except _Refused as error:
            raise UserError(str(error)) from error
        except (*_FAILURES, TemplateError) as error:
            raise UserError(f"the model's chat template cannot take this conversation ({error})") from error
        text = "".join(pieces)
        last = turns[-1][1].strip()
        if continued and last in text:
            text = text[: text.rindex(last) + len(last)]
        return text


def imported_template(tokenizer: Tokenizer) -> ImportedChatTemplate | None:
    """The chat template beside a tokenizer, None where it came without one. Raises UserError for one that is broken."""
    companions = tokenizer.companions
    settings = _settings(companions, "tokenizer_config.json")
    text = companions["chat_template.jinja"].decode("utf-8") if "chat_template.jinja" in companions else None
    text = settings.get("chat_template") if text is None else text
    if isinstance(text, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
        text = named.get("default")
    if not isinstance(text, str):
        return None
    pieces = _settings(companions, "special_tokens_map.json") | settings
    special = {name: _piece(pieces.get(name)) for name in _TOKENS}
    return ImportedChatTemplate(text, {name: piece for name, piece in special.items() if piece is not None})


def _settings(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        return parse_object(files[name]) if name in files else {}
    except UnreadableText as error:
        raise UserError(f"{error.at(name)}; restore it, or import the model again") from error


def _piece(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _check_size(characters: int) -> None:
    if characters > _MOST_TEXT:
        raise _TooMuch(f"more than {_MOST_TEXT:,} characters")


def _replaced(text: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = _text(text), _text(old), _text(new)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    _check_size(len(text) + times * len(new))
    return text.replace(old, new, times)


def _joined_by(items: Iterable[Any], between: Any = "") -> str:
    texts, between = [_text(item) for item in items], _text(between)
    _check_size(sum(map(len, texts)) + len(texts) * len(between))
    return between.join(texts)


def _raise(message: object) -> NoReturn:
    raise _Refused(str(message))


def _time_now(form: object) -> str:
    return datetime.now().strftime(str(form)[:100])


def _check_items(value: Any) -> None:
    """Raises _TooMuch for lists inside lists that would become a text of any length."""
    waiting, items = [value], 0
    while waiting:
        one = waiting.pop()
        inside = one if isinstance(one, (list, tuple)) else ()
        if isinstance(one, dict):
            inside = [*one.keys(), *one.values()]
        items += len(inside)
        if items > _MOST_ITEMS:
            raise _TooMuch(f"a list of more than {_MOST_ITEMS:,} items as a text")
        waiting += inside


def _printable(value: Any) -> Any:
    _check_items(value)
    return value


def _text(value: Any) -> str:
    _check_items(value)
    return str(value)


def _indented(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    text, before = _text(text), width if isinstance(width, str) else " " * min(int(width), 64)
    _check_size(len(text) + (text.count("\n") + 1) * len(before))
    lines = [before + line if line or blank else line for line in text.split("\n")]
    return "\n".join(lines) if first else "\n".join([text.split("\n")[0], *lines[1:]])


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _check_items(value)
    indent = min(int(indent), 8) if indent else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
