"""Parts of the backbone by their names in the configuration: what counting, planning, exporting and building ask of
each, known before any framework is loaded. Their cells are in `pangu_sigma.model.layers`.

Legend: D hidden width, P positions of a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PartSpec:
    """`in_pangu`: whether PanGu-alpha has the part, which the fused decode step and most export formats know alone."""

    in_pangu: bool = False


@dataclass(frozen=True)
class NormSpec(PartSpec):
    """A normalisation. `tensors`: its parameters [D] and the value that each begins with."""

    tensors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PositionSpec(PartSpec):
    """How positions enter. `has_table`: by rows of a learned table [P, D]; `rotates`: by rotating queries and keys."""

    has_table: bool = False
    rotates: bool = False


@dataclass(frozen=True)
class FeedForwardKind(PartSpec):
    """A feed-forward network. `gate`: activation of its gate, by definition; None without a gate (Shazeer 2020, arXiv
    2002.05202)."""

    gate: str | None = None


@dataclass(frozen=True)
class HeadSpec(PartSpec):
    """An output head. `tied`: its matrix is the word embedding."""

    tied: bool = False


NORM_SPECS = {
    "layernorm": NormSpec(in_pangu=True, tensors={"gamma": 1.0, "beta": 0.0}),
    "rmsnorm": NormSpec(tensors={"gamma": 1.0}),
}
POSITION_SPECS = {
    "learned": PositionSpec(in_pangu=True, has_table=True),
    "rope": PositionSpec(rotates=True),
}
FEED_FORWARD_KINDS = {
    "mlp": FeedForwardKind(in_pangu=True),
    "swiglu": FeedForwardKind(gate="silu"),
    "geglu": FeedForwardKind(gate="gelu"),
}
HEAD_SPECS = {
    "tied": HeadSpec(in_pangu=True, tied=True),
    "untied": HeadSpec(),
}
