"""The seam of expert parallelism: rows travel to their experts and back at exactly these two points."""

from __future__ import annotations

from mindspore import Tensor, nn


class LocalExchange(nn.Cell):
    """The exchange of a process that owns every expert: the identity in both directions."""

    def to_experts(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hand each expert slot's rows ([n_i, D] each) to the process that owns the expert."""
        return rows

    def to_tokens(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hand each expert slot's results ([n_i, D] each) back to the process that owns the tokens."""
        return rows

    def construct(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.to_experts(rows)
