"""In a dry process (`parallel.dry.dry_process`): build a configuration's training graph and let MindSpore compile it.

    python -m pangu_sigma.plan.dry_training_graph CONFIG.yaml RESULT.json

What it tells about itself goes to RESULT.json. The graphs of the step stay under `graphs/`, those of the update of the
shared parameters under `update/`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import mindspore as ms
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from pangu_sigma.config import Config, load_config
from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size
from pangu_sigma.model.build_model import build_network, build_structure
from pangu_sigma.training.distributed.spmd_step import SpmdTrainStep, parallel_context, spmd_train_step
from parallel.dry.dry_process import start_semi_auto
from parallel.dry.parameter_placement import placements
from parallel.operator_layout import MeshLayout


def compile_step(config: Config) -> dict[str, object]:
    """Compile the step of one micro-batch, or a rank's stage of a whole step's pipeline; return its parameters and
    full expert tensors (see `SpmdTrainStep`)."""
    layer_names, parallel = config.model.sparse_prefixes, config.parallel
    layout = MeshLayout(parallel.mesh, config.run.device, parallel.sequence_parallel)
    with no_init_parameters():
        # Tables are no part of the graph.
        tables = {layer_name: {} for layer_name in layer_names}
        model = build_structure(config, vocabulary_size(config), 0, tables, layout=layout)
        net = build_network(model)
        inputs = model.training_inputs(config.train.batch_size // config.train.gradient_accumulation_steps)
        start_semi_auto(**parallel_context(model, inputs))
        if config.train.recompute:
            net.recompute_blocks()
        step = spmd_train_step(model, net, inputs, int(os.environ["RANK_ID"]))
    parameters = {p.name: p.shape for p in net.get_parameters()}
    started = time.perf_counter()
    step.compile()
    placed = placements(step.cell)
    compile_update(step)
    return {
        "seconds": time.perf_counter() - started,
        "parameters": parameters,
        "expert_inputs": step.experts,
        "placed": placed,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def compile_update(step: SpmdTrainStep) -> None:
    """Compile the update of the shared parameters, which have become this rank's parts."""
    ms.reset_auto_parallel_context()
    ms.set_context(save_graphs_path="update")
    update = step.update()
    scalars = [Tensor(shape=[], dtype=ms.float32) for _ in range(6)]
    update.compile(*scalars, *(Tensor(shape=list(p.shape), dtype=ms.float32) for p in update.parameters))


def main() -> None:
    """The process's whole work."""
    source, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(compile_step(load_config(source))), encoding="utf-8")


if __name__ == "__main__":
    main()
