"""In the dry process: a sparse layer's networks with loss and gradients, experts as parameters cut over the mesh."""

import json
import sys
import time

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from parallel.dry.dry_process import start_semi_auto
from parallel.mesh import Mesh
from parallel.operator_layout import MeshLayout
from rre.dispatch.capacity_dispatch import CapacityExperts
from rre.feed_forward_spec import FeedForwardSpec

settings = json.loads(sys.argv[1])
mesh = Mesh(**settings["mesh"])
slots, capacity, hidden, inner, tokens = (settings[k] for k in ("slots", "capacity", "hidden", "inner", "tokens"))
layout = MeshLayout(mesh)
# MindSpore's pass lets each input be cut along one axis alone; parameters are cut as their operators say.
start_semi_auto(tuple((mesh.rows, 1) for _ in range(4)))


class Loss(nn.Cell):
    def __init__(self):
        super().__init__()
        self.scale = Parameter(initializer("ones", (hidden, hidden), ms.float32), name="scale")
        shapes = {"up": (slots, hidden, inner), "up_bias": (slots, inner)}
        shapes |= {"down": (slots, inner, hidden), "down_bias": (slots, hidden)}
        for name, shape in shapes.items():
            setattr(self, name, Parameter(initializer("zeros", shape, ms.float32), name=name))
        self.product = layout(ops.MatMul(), ("rows", 1), (1, 1))
        self.networks = CapacityExperts(layout, FeedForwardSpec("fast_gelu"), ms.float16, mesh)
        self.mul = layout(ops.Mul(), ("rows", 1), ("rows", 1))
        self.sum = layout(ops.ReduceSum(), ("rows", 1))

    def construct(self, x, dispatch, combine, kept):
        weights = (self.up, self.up_bias, self.down, self.down_bias)
        y = self.networks(self.product(x, self.scale), (dispatch, combine, kept), weights)
        return self.sum(self.mul(y, y), (0, 1))


class StepWithGradients(nn.Cell):
    def __init__(self, loss):
        super().__init__()
        self.both = ops.value_and_grad(loss, None, ms.ParameterTuple(loss.trainable_params()))

    def construct(self, *inputs):
        return self.both(*inputs)


with no_init_parameters():
    step = StepWithGradients(Loss())
step.set_train()
rows, of_group = mesh.rows, slots // mesh.placement_groups
# With a dataset strategy the inputs that a rank gives are its own parts.
local = [
    Tensor(shape=shape, dtype=dtype)
    for shape, dtype in (
        ((tokens // rows, hidden), ms.float32),
        ((1, of_group * capacity), ms.int32),
        ((1, tokens // rows), ms.int32),
        ((1, tokens // rows), ms.float32),
    )
]
started = time.perf_counter()
step.compile(*local)
print(json.dumps({"seconds": time.perf_counter() - started, "cut": {p.name: p.shape for p in step.get_parameters()}}))
