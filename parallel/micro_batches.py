"""In-graph micro-batches: cells of a pipeline-parallel step, marked as MindSpore's pipeline pass looks for them.

The pass works on one graph of a whole step:
1. it finds the micro-batches by the slices of the inputs (`MicroBatchSlice`);
2. it finds the sum of their losses by a mark on the additions (`MicroBatches`);
3. it divides the graph at the stages of the cells, and orders each rank's stage (one forward, one backward);
4. it adds each micro-batch's gradients to buffers, which `AccumulatedGradients` reads and clears.

The compiling process needs `parallel.operator_layout.LOCAL_SLICES` in its environment.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from parallel.operator_layout import Layout


class MicroBatchSlice(nn.Cell):
    """Inputs [A n, …] of a whole step -> those [n, …] of micro-batch `index` of the `count` = A."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.index, self.count = index, count
        self.slice = ops.StridedSlice().add_prim_attr("strided_slice_flag", True)

    def construct(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        slices = ()
        for x in inputs:
            n, inner = x.shape[0] // self.count, x.shape[1:]
            begin = (self.index * n,) + (0,) * len(inner)
            end = ((self.index + 1) * n,) + inner
            slices = slices + (self.slice(x, begin, end, (1,) * len(x.shape)),)
        return slices


class MicroBatches(nn.Cell):
    """loss(micro-batch) summed over the A micro-batches of a step."""

    def __init__(self, loss: nn.Cell, count: int) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.slices = nn.CellList([MicroBatchSlice(i, count) for i in range(count)])
        self.add = [ops.Add().add_prim_attr("pipeline_end", i) for i in range(count)]

    def construct(self, *inputs: Tensor) -> Tensor:
        total = None
        for i, micro_batch in enumerate(self.slices):
            loss = self.loss(*micro_batch(*inputs))
            total = loss if total is None else self.add[i](total, loss)
        return total


class PerMicroBatchCopy(nn.Cell):
    """(table [V, D] of one stage, input of a micro-batch) -> the same table as a value of that micro-batch, sharded by
    rows over the tensor axis.

    The pass sends such a value to another stage as it sends rows. A parameter itself it sends once a step; but of one
    that its replicas divide (`parallel.optimizer_sharding`) it would send a rank's optimizer shard, where the whole
    tensor-parallel shard is needed.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        # A product with 1 would be simplified away, and the parameter itself be sent.
        self.identity = layout(ops.Identity(), ("tensor", 1))

    def construct(self, table: Tensor, after: Tensor) -> Tensor:
        return self.identity(ops.depend(table, after))


class AccumulatedGradients(nn.Cell):
    """Gradients of `parameters` over all micro-batches, from the buffers in which a rank's shards of them were summed.

    The pass adds every micro-batch's gradient to the parameter called `accu_grads.` and the parameter's name, and sums
    over the ranks that hold the same shard when the last has come: into the buffer, or, where parameters are divided
    among these ranks (`optimizer_parallel`), into the gradient that it gives back.
    """

    def __init__(self, parameters: Sequence[Parameter], optimizer_parallel: bool) -> None:
        super().__init__(auto_prefix=False)
        self.buffers = ParameterTuple(parameters).clone(prefix="accu_grads", init="zeros")
        self.sum_is_returned = optimizer_parallel
        self.each = ops.HyperMap()

    def construct(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.sum_is_returned:
            return self.each(_copy_and_clear, gradients, self.buffers)
        return self.each(_buffer_after, gradients, self.buffers)


def _buffer_after(gradient: Tensor, buffer: Tensor) -> Tensor:
    return _copy_and_clear(ops.depend(buffer, gradient), buffer)


def _copy_and_clear(gradient: Tensor, buffer: Tensor) -> Tensor:
    # A copy: what was summed without other ranks is the buffer itself.
    copy = gradient * 1.0
    return ops.depend(copy, ops.assign(ops.depend(buffer, copy), ops.zeros_like(buffer)))
