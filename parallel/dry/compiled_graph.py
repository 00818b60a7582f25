"""Reads a compiled graph that MindSpore saved: its operators, its collectives with groups and bytes, a rank's parts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.dry.stand_in_libraries import DryCompileError

POINT_TO_POINT = ("Send", "Receive")
COLLECTIVES = ("AlltoAll", "AllReduce", "AllGather", "ReduceScatter", *POINT_TO_POINT)
BYTES = {
    "Float16": 2, "BFloat16": 2, "Float32": 4, "Float64": 8, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1, "Int8": 1,
}  # fmt: skip

_CALL = re.compile(r"^  (%\d+)\(.*?\) = (?:PrimFunc_)?(\w+)\((.*?)\)(?: \{instance name: (\S+)\})?(?: |$)(.*)")
_PEER = re.compile(r"(?:dest|src)_rank: I64\((\d+)\)")
_MICRO = re.compile(r"[{ ]micro: I64\((\d+)\)")
_RANKS = re.compile(r"group_rank_ids: \(([\d, ]*)\)")
_OF_PARAMETER = re.compile(r'[{ ]mirror_user_id: "([^"]+)"')
_NUMBER = re.compile(r'[{ ]unique_id: "(\d+)"')
_FORWARD = re.compile(r'forward_unique_id: "(\d+)"')
_TENSOR = re.compile(r"Tensor\[(\w+)\](?:>?\]?), \(([\d, ]*)\)")
_SCOPE = re.compile(r"# Fullname with scope: \((.*)\)")
_PARAMETER = re.compile(r"^(%para\d+_\S+?): <(?:Ref\[)?Tensor\[(\w+)\]\]?, \(([\d, ]*)\)(?:, ref_key=([^,>]+))?", re.M)


@dataclass(frozen=True)
class Operator:
    """Operator of a compiled graph: what it reads (`%12`, `%para3_x`), the types and shapes of
    the tensors it takes and gives, where in the cells it stands, the ranks that it speaks with; `number`: MindSpore's
    own, and `forward`: that of the operator whose gradient it is. Gradients of equal operators share one scope, so
    theirs names any of them. Of what is sent to one rank alone, `ranks` is that rank. `micro`: the micro-batch in a
    graph of several. `parameter`: the one that MindSpore names beside it.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    takes: tuple[tuple[str, tuple[int, ...]], ...]
    gives: tuple[tuple[str, tuple[int, ...]], ...]
    scope: str
    instance: str
    ranks: tuple[int, ...]
    number: str | None
    forward: str | None
    micro: str | None = None
    parameter: str | None = None

    @property
    def backward(self) -> bool:
        """Whether it belongs to the gradient."""
        return self.scope.startswith("Gradients/")

    @property
    def recomputed(self) -> bool:
        """Whether it is a forward one that stands in the gradient a second time: a copy has no number of its own."""
        return self.scope.startswith("recompute_") and self.number is None


@dataclass(frozen=True)
class Collective:
    """Collective of a compiled graph: its kind, the ranks that take part, the bytes that a rank puts in,
    and in which direction; `recomputed`: a forward one that stands in the gradient a second time. Of a Send and a
    Receive, the other rank and the bytes that go there or come from it.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int
    backward: bool
    scope: str = ""
    name: str = ""
    recomputed: bool = False


def last_graph(folder: Path) -> str:
    """The text of the last graph that was saved under a rank's folder: forward and backward in one."""
    files = sorted(folder.glob("*_backend_pass_*.ir"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    if not files:
        raise DryCompileError(f"{folder} holds no graph from the end of a compilation")
    return files[-1].read_text(encoding="utf-8")


def operators(graph: str) -> Iterator[Operator]:
    """Every operator of a graph's text, in its order."""
    lines = graph.splitlines()
    for line_index, line in enumerate(lines):
        call = _CALL.match(line)
        if call is None:
            continue
        name, kind, reads, instance, rest = call.groups()
        types = lines[line_index + 1] if line_index + 1 < len(lines) else ""
        before, _, after = types.partition(") -> (")
        scope = _SCOPE.search(lines[line_index + 2]) if line_index + 2 < len(lines) else None
        ranks = (_PEER if kind in POINT_TO_POINT else _RANKS).search(rest)
        yield Operator(
            name=name,
            kind=kind,
            reads=tuple(re.findall(r"%para\d+_[^\s,)]+|%\d+", reads)),
            takes=_tensors(before),
            gives=_tensors(after),
            scope=scope[1] if scope else "",
            instance=instance or "",
            ranks=_numbers(ranks[1]) if ranks else (),
            number=_one(_NUMBER, rest),
            forward=_one(_FORWARD, rest),
            micro=_one(_MICRO, rest),
            parameter=_one(_OF_PARAMETER, rest),
        )


def collectives(graph: str) -> list[Collective]:
    """Every collective of a graph, in its order; one of a gradient stands where its forward one does."""
    everything = list(operators(graph))
    scopes = {operator.number: operator.scope for operator in everything if operator.number and not operator.backward}
    results = []
    for operator in everything:
        if operator.kind not in COLLECTIVES:
            continue
        if not operator.takes and operator.kind != "Receive":
            raise DryCompileError(f"the graph does not tell the type of {operator.kind} {operator.name}")
        # A Receive names some tensor to wait for, which is not what it receives.
        moved = operator.gives if operator.kind == "Receive" else operator.takes
        size = sum(BYTES[kind] * math.prod(shape) for kind, shape in moved)
        scope = scopes.get(operator.forward, operator.scope) if operator.backward else operator.scope
        results.append(
            Collective(
                operator.kind, operator.ranks, size, operator.backward, scope, operator.name, operator.recomputed
            )
        )
    return results


def parameter_shards(graph: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of the part that this rank holds."""
    return {key: _numbers(shape) for _, _, shape, key in _PARAMETER.findall(graph) if key}


def graph_inputs(graph: str) -> list[tuple[str, tuple[int, ...]]]:
    """(name in the graph, shape of the part that this rank gives) of every input that is no parameter, in order."""
    return [(name, _numbers(shape)) for name, _, shape, key in _PARAMETER.findall(graph) if not key]


def ancestors(by_name: dict[str, Operator], name: str) -> set[str]:
    """Everything that an operator waits for."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        operator = by_name.get(waiting.pop())
        for read in operator.reads if operator else ():
            if read not in seen:
                seen.add(read)
                waiting.append(read)
    return seen


def _one(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match[1] if match else None


def _tensors(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((kind, _numbers(shape)) for kind, shape in _TENSOR.findall(text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.replace(" ", "").split(",") if n)
