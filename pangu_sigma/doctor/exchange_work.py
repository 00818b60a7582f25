"""Rows that travel to another process and back, with their gradients, compared with what must come; result as JSON.

    msrun … python -m pangu_sigma.doctor.exchange_work CPU FOLDER

On CPU the way is a training's own (`parallel.comm.exchange`); on Ascend it is the AlltoAll that MindSpore puts into a
training's graph.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

ROWS, WIDTH = 3, 4


def run(device: str) -> dict[str, object]:
    """Whether rows and gradients arrive: of every rank's rows the j-th block goes to rank j, which multiplies it by
    j + 2, and returns; whole numbers, so every bit must be right."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops
    from mindspore.communication import get_group_size, get_rank, init

    from parallel.comm.exchange import GatheredExchange
    from parallel.mesh import Mesh

    ms.set_device(device)
    ms.set_context(mode=ms.GRAPH_MODE)
    init("hccl" if device == "Ascend" else "mccl")
    rank, size = get_rank(), get_group_size()
    blocks = np.repeat(np.arange(size, dtype=np.int32), ROWS)[:, None]

    class Exchanged(nn.Cell):
        """Rows to the one expert of every rank, and back."""

        def __init__(self) -> None:
            super().__init__()
            self.exchange = GatheredExchange(Mesh(expert=size), rank, size)
            self.expert_blocks = Tensor(blocks)

        def construct(self, x: Tensor) -> Tensor:
            arrived = self.exchange.to_experts(x)
            # This rank's expert is number 0 here; whatever goes elsewhere has another number.
            is_local = (self.exchange.choices(self.expert_blocks) == 0).astype(ms.float32)
            return self.exchange.to_tokens(arrived * is_local * (rank + 2.0))

    class Permuted(nn.Cell):
        """Blocks to their ranks, and back."""

        def __init__(self) -> None:
            super().__init__()
            self.all_to_all = ops.AlltoAll(size, 0, 0)

        def construct(self, x: Tensor) -> Tensor:
            return self.all_to_all(self.all_to_all(x) * (rank + 2.0))

    class Scored(nn.Cell):
        """A number whose gradient needs the way there and back: the sum of squares of what returned."""

        def __init__(self) -> None:
            super().__init__()
            self.travel = Permuted() if device == "Ascend" else Exchanged()

        def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
            back = self.travel(x)
            return (back * back).sum(), back

    rows = np.arange(size * ROWS * WIDTH, dtype=np.float32).reshape(-1, WIDTH) % 64 + rank
    began = time.perf_counter()
    graph = ops.value_and_grad(Scored().set_train(), 0, None, has_aux=True)
    (_, returned), gradient = graph(Tensor(rows))
    seconds = time.perf_counter() - began
    factors = blocks.astype(np.float32) + 2
    right = np.array_equal(returned.asnumpy(), rows * factors)
    back = np.array_equal(gradient.asnumpy(), 2 * rows * factors**2)
    return {"rank": rank, "size": size, "rows": bool(right), "gradients": bool(back), "seconds": seconds}


if __name__ == "__main__":
    result = run(sys.argv[1])
    (Path(sys.argv[2]) / f"rank_{result['rank']}.json").write_text(json.dumps(result), encoding="utf-8")
