"""Micro-batches inside one graph, as MindSpore's pipeline pass looks for them.

The pass finds the micro-batches of a graph by the slices of its inputs, and their sum by a mark on the additions; it
then cuts the graph at the stages of the cells and orders each rank's part (one forward, one backward). The compiling
process needs `parallel.operator_layout.LOCAL_SLICES` in its environment.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from parallel.operator_layout import Layout


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


class HandedOn(nn.Cell):
    """(table [V, D] of one stage, input of a micro-batch) -> the same table as a value of that micro-batch, cut by rows
    over the tensor axis.

    Another stage is sent such a value as it is sent rows. A parameter itself the pass sends once a step; but of one
    that its holders divide (`parallel.optimizer_sharding`) it sends a rank's piece where all of its part is awaited.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        # A product with 1 would be simplified away, and the parameter itself be sent.
        self.identity = layout(ops.Identity(), ("tensor", 1))

    def construct(self, table: Tensor, after: Tensor) -> Tensor:
        return self.identity(ops.depend(table, after))


class Accumulated(nn.Cell):
    """Gradients of `parameters` over all micro-batches, out of the buffers in which a rank's part of them was summed.

    The pass adds every micro-batch's gradient to the parameter called `accu_grads.` and the parameter's name, and sums
    over the ranks that hold the same part when the last has come: into the buffer, or, where parameters are divided
    among these ranks (`optimizer_parallel`), into the gradient that it gives back.
    """

    def __init__(self, parameters: Sequence[Parameter], optimizer_parallel: bool) -> None:
        super().__init__(auto_prefix=False)
        self.buffers = ParameterTuple(parameters).clone(prefix="accu_grads", init="zeros")
        self.given_back = optimizer_parallel
        self.each = ops.HyperMap()

    def construct(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.given_back:
            return self.each(_cleared, gradients, self.buffers)
        return self.each(_taken, gradients, self.buffers)


def _taken(gradient: Tensor, buffer: Tensor) -> Tensor:
    return _cleared(ops.depend(buffer, gradient), buffer)


def _cleared(gradient: Tensor, buffer: Tensor) -> Tensor:
    # A copy: what was summed without other ranks is the buffer itself.
    found = gradient * 1.0
    return ops.depend(found, ops.assign(ops.depend(buffer, found), ops.zeros_like(buffer)))
