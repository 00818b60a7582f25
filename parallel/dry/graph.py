"""Reads a compiled graph that MindSpore saved: its collectives with groups and bytes, and what a rank holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from parallel.dry.standin import DryCompileError

COLLECTIVES = ("AlltoAll", "AllReduce", "AllGather", "ReduceScatter", "Send", "Receive")
BYTES = {"Float16": 2, "BFloat16": 2, "Float32": 4, "Float64": 8, "Int32": 4, "Int64": 8, "Bool": 1}

_CALL = re.compile(rf"= ({'|'.join(COLLECTIVES)})\(.*?instance name: (\S+)\}} .*?group_rank_ids: \(([\d, ]*)\)")
_TYPE = re.compile(r":\s+\(<Tensor\[(\w+)\], \(([\d, ]*)\)")
_PARAMETER = re.compile(r"^%para\d+_.*?: <Ref\[Tensor\[\w+\]\], \(([\d, ]*)\), ref_key=([^,>]+)", re.MULTILINE)


@dataclass(frozen=True)
class Collective:
    """One collective: its kind, the ranks that take part, the bytes that a rank puts in, and in which direction."""

    kind: str
    ranks: tuple[int, ...]
    bytes: int
    backward: bool


def last_graph(folder: Path) -> str:
    """The text of the last graph that was saved under a rank's folder: forward and backward in one."""
    found = sorted(folder.glob("*_backend_pass_*.ir"))
    if not found:
        raise DryCompileError(f"{folder} holds no graph from the end of a compilation")
    return found[-1].read_text(encoding="utf-8")


def collectives(graph: str) -> list[Collective]:
    """Every collective of a graph, in its order."""
    lines = graph.splitlines()
    found = []
    for number, line in enumerate(lines):
        call = _CALL.search(line)
        if call is None:
            continue
        kind, name, ranks = call.groups()
        told = _TYPE.search(lines[number + 1])
        if told is None:
            raise DryCompileError(f"the graph does not tell the type of {kind} in line {number + 1}")
        size = BYTES[told[1]] * math.prod(_numbers(told[2]))
        found.append(Collective(kind, _numbers(ranks), size, name.startswith("grad")))
    return found


def held(graph: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of the part that this rank holds."""
    return {name: _numbers(shape) for shape, name in _PARAMETER.findall(graph)}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.replace(" ", "").split(",") if n)
