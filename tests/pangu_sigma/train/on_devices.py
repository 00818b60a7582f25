"""In the dry process: what `train` builds on one rank of a mesh of devices, up to where a device would compute.

    python on_devices.py CONFIG.yaml RESULT.npz

The trainer compiles its step, the shared parameters get their values, and the graphs of a phase that freezes them and
of an evaluation are compiled beside it. RESULT holds for every shared parameter the rank's part of it (`value NAME`),
what MindSpore's own loader would have made of the whole one (`loaded NAME`) and, as `moment NAME`, the optimizer's.
"""

import os
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.communication import init
from mindspore.parallel._tensor import _load_tensor_by_layout

from pangu_sigma.config import load_config, vocabulary_size
from pangu_sigma.model.build import build_model, initialise_shared
from pangu_sigma.model.initial import initial_value
from pangu_sigma.train.mesh_evaluation import Measurement
from pangu_sigma.train.objective import Objective
from pangu_sigma.train.trainer import Trainer
from parallel.processes import Processes


def main() -> None:
    config, rank = load_config(sys.argv[1]), int(os.environ["RANK_ID"])
    ms.set_context(device_target="GPU", mode=ms.GRAPH_MODE, save_graphs=2, save_graphs_path="graphs")
    init("nccl")
    model = build_model(config, vocabulary_size(config), 0, processes=Processes(config.parallel.mesh, rank))
    trainer = Trainer(model)
    step = trainer._graphs(True, Objective())
    layouts = step.cell.parameter_layout_dict
    initialise_shared(model)
    found = {}
    for name, array in model.shared.values().items():
        whole = initial_value(name, model.shared.shapes[name], config.run.seed, config.model)
        loaded = _load_tensor_by_layout(Tensor(whole), layouts[name], rank) if name in layouts else whole
        found[f"value {name}"] = array
        found[f"loaded {name}"] = np.asarray(loaded)
    for name, array in trainer.optimizer.moments().items():
        found[f"moment {name}"] = array
    ms.set_context(save_graphs_path="frozen")
    trainer._graphs(False, Objective())
    ms.set_context(save_graphs_path="evaluation")
    measured = Measurement(model, 2 * config.parallel.mesh.rows, 8)
    with measured.graph.context:
        measured.cell.compile(*measured.cell.get_inputs())
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
