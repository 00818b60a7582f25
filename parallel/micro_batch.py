"""Micro-batches inside one graph, as MindSpore's pipeline pass looks for them.

The pass finds the micro-batches of a graph by the slices of its inputs, and their sum by a mark on the additions; it
then cuts the graph at the stages of the cells and orders each rank's part (one forward, one backward). The compiling
process needs `parallel.layout.SLICES_STAY` in its environment.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops


class MicroBatch(nn.Cell):
    """Inputs [A n, …] of a whole step -> those [n, …] of micro-batch `number` of A."""

    def __init__(self, number: int, of: int) -> None:
        super().__init__()
        self.number, self.of = number, of
        self.slice = ops.StridedSlice().add_prim_attr("strided_slice_flag", True)

    def construct(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        parts = ()
        for x in inputs:
            n, inner = x.shape[0] // self.of, x.shape[1:]
            begin = (self.number * n,) + (0,) * len(inner)
            end = ((self.number + 1) * n,) + inner
            parts = parts + (self.slice(x, begin, end, (1,) * len(x.shape)),)
        return parts


class MicroBatches(nn.Cell):
    """loss(micro-batch) summed over the A micro-batches of a step."""

    def __init__(self, loss: nn.Cell, number: int) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.parts = nn.CellList([MicroBatch(i, number) for i in range(number)])
        self.add = [ops.Add().add_prim_attr("pipeline_end", i) for i in range(number)]

    def construct(self, *inputs: Tensor) -> Tensor:
        total = None
        for i, part in enumerate(self.parts):
            loss = self.loss(*part(*inputs))
            total = loss if total is None else self.add[i](total, loss)
        return total


class Accumulated(nn.Cell):
    """Gradients of `parameters` over all micro-batches, out of the buffers in which a rank's part of them was summed.

    The pass adds every micro-batch's gradient to the parameter called `accu_grads.` and the parameter's name, and sums
    over the ranks that hold the same part when the last has come.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.buffers = ParameterTuple(parameters).clone(prefix="accu_grads", init="zeros")
        self.each = ops.HyperMap()

    def construct(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.each(_taken, gradients, self.buffers)


def _taken(gradient: Tensor, buffer: Tensor) -> Tensor:
    buffer = ops.depend(buffer, gradient)
    found = buffer * 1.0
    return ops.depend(found, ops.assign(ops.depend(buffer, found), ops.zeros_like(buffer)))
