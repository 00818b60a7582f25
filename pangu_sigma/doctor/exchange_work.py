"""One all-to-all with its gradient in a process of several, compared with what it must give; result as JSON.

    msrun … python -m pangu_sigma.doctor.exchange_work CPU FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

ROWS, WIDTH = 3, 4


def run(device: str) -> dict[str, object]:
    """Whether rows and gradients arrive: block j of rank r is the r-th block of rank j afterwards, bit for bit."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops
    from mindspore.communication import get_group_size, get_rank, init

    ms.set_device(device)
    ms.set_context(mode=ms.GRAPH_MODE)
    init("hccl" if device == "Ascend" else "mccl")
    rank, size = get_rank(), get_group_size()

    class Gathered(nn.Cell):
        """CPU has no all-to-all: every rank gathers everything and keeps its blocks. Its transpose is itself."""

        def __init__(self) -> None:
            super().__init__()
            self.gather = ops.AllGather()

        def exchange(self, x: Tensor) -> Tensor:
            return self.gather(x.reshape((1,) + x.shape))[:, rank]

        def construct(self, x: Tensor) -> Tensor:
            return self.exchange(x)

        def bprop(self, x: Tensor, out: Tensor, dout: Tensor):
            return (self.exchange(dout),)

    class Scored(nn.Cell):
        """A number whose gradient needs the way back: the sum of squares of what arrived."""

        def __init__(self) -> None:
            super().__init__()
            self.exchange = ops.AlltoAll(size, 0, 0) if device == "Ascend" else Gathered()

        def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
            arrived = self.exchange(x)
            return (arrived * arrived).sum(), arrived

    sent = [np.arange(size * ROWS * WIDTH, dtype=np.float32).reshape(size, ROWS, WIDTH) + 1000 * r for r in range(size)]
    shape = (size, ROWS, WIDTH) if device == "CPU" else (size * ROWS, WIDTH)
    began = time.perf_counter()
    (_, arrived), gradient = ops.value_and_grad(Scored(), 0, None, has_aux=True)(Tensor(sent[rank].reshape(shape)))
    seconds = time.perf_counter() - began
    expected = np.stack([sent[r][rank] for r in range(size)])
    right = np.array_equal(arrived.asnumpy().reshape(expected.shape), expected)
    back = np.array_equal(gradient.asnumpy().reshape(expected.shape), 2 * sent[rank])
    return {"rank": rank, "size": size, "rows": bool(right), "gradients": bool(back), "seconds": seconds}


if __name__ == "__main__":
    found = run(sys.argv[1])
    (Path(sys.argv[2]) / f"rank_{found['rank']}.json").write_text(json.dumps(found), encoding="utf-8")
