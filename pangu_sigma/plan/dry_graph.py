"""In a dry process (`parallel.dry.process`): build the training graph of a configuration and let MindSpore compile it.

    python -m pangu_sigma.plan.dry_graph CONFIG.yaml RESULT.json

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
from mindspore import Parameter, Tensor
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from pangu_sigma.config import Config, load_config, vocabulary_size
from pangu_sigma.model.build import Model, build_model
from pangu_sigma.model.inputs import fixed_inputs
from pangu_sigma.model.signature import FlatSignature
from pangu_sigma.train.objective import Objective
from pangu_sigma.train.pipelined import PipelinedStep, expert_tensors, step_inputs
from pangu_sigma.train.step import GradientStep, SharedUpdate
from parallel.dry.graph import held, last_graph
from parallel.dry.process import start_semi_auto
from parallel.layout import MeshLayout

NESTED_CALLS = 100_000


def compile_step(config: Config) -> dict[str, object]:
    """Compile the step of one micro-batch, or a rank's stage of a whole step's pipeline; return its parameters and
    expert tensors before they are cut (an input's number with its shape, None where experts are parameters)."""
    vocab = vocabulary_size(config)
    places = config.model.sparse_prefixes
    parallel, rank = config.parallel, int(os.environ["RANK_ID"])
    layout = MeshLayout(parallel.mesh, config.run.device, parallel.sequence_parallel)
    with no_init_parameters():
        # Tables are no part of the graph, and neither are experts.
        model = build_model(
            config, vocab, 0, tables={place: {} for place in places}, initialise=False, layout=layout, with_store=False
        )
        step, given = _step(config, model, model.training_signature(micro_batch(config)), rank)
    parameters = {p.name: p.shape for p in model.net.get_parameters()}
    # A loop over tensors becomes calls inside calls: of several hundred parameters, more than MindSpore's own limit.
    ms.set_recursion_limit(NESTED_CALLS)
    started = time.perf_counter()
    step.compile(*step.get_inputs())
    parts = held(last_graph(Path(f"graphs/rank_{rank}")))
    mine = step.shared if parallel.pipeline > 1 else model.net.get_parameters()
    compile_update({p.name: parts[p.name] for p in mine}, layout)
    return {
        "seconds": time.perf_counter() - started,
        "parameters": parameters,
        "expert_inputs": given,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def micro_batch(config: Config) -> int:
    """Samples of one micro-batch, of all ranks."""
    return config.train.batch_size // config.train.accumulation


def _step(
    config: Config, model: Model, signature: FlatSignature, rank: int
) -> tuple[GradientStep | PipelinedStep, dict[str, tuple[int | None, tuple[int, ...]]]]:
    """The step's cell under its parallel context, and its expert tensors."""
    parallel, layout = config.parallel, model.layout
    experts = expert_tensors(signature)
    if parallel.pipeline > 1:
        inputs = step_inputs(signature, config.train.accumulation)
    else:
        inputs = [*fixed_inputs(signature.batch, signature.length).values(), *signature.cut_inputs()]
    start_semi_auto(
        tuple(layout.placed(cut) for _, _, cut in inputs),
        enable_parallel_optimizer=parallel.optimizer_parallel,
        gradients_mean=False,
        pipeline_stages=parallel.pipeline,
    )
    if config.train.recompute:
        model.net.recompute_blocks()
    if parallel.pipeline > 1:
        stage = parallel.mesh.coordinates(rank).stage
        step = PipelinedStep(
            model.net, signature, layout, config.train.accumulation, stage, parallel.optimizer_parallel
        )
        return step, {name: (None, shape) for name, shape in experts.items()}
    fixed, given = len(inputs) - len(signature.cut_inputs()), {}
    numbers = [fixed + i for _, first, end in signature.bounds for i in range(first, end)]
    for number, (name, shape) in zip(numbers, experts.items(), strict=True):
        given[name] = (number, shape)
    return GradientStep(model.net, signature, layout, True, Objective()), given


def compile_update(parts: dict[str, tuple[int, ...]], layout: MeshLayout) -> None:
    """Compile the update of the shared parameters on a rank's own parts of them: a graph without communication."""
    ms.reset_auto_parallel_context()
    ms.set_context(save_graphs_path="update")
    real = ms.float32
    with no_init_parameters():
        mine = [Parameter(initializer("zeros", shape, real), name=name) for name, shape in parts.items()]
        update = SharedUpdate(mine, layout)
    scalars = [Tensor(shape=[], dtype=real) for _ in range(6)]
    update.compile(*scalars, *(Tensor(shape=list(shape), dtype=real) for shape in parts.values()))


def main() -> None:
    """The process's whole work."""
    source, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(compile_step(load_config(source))), encoding="utf-8")


if __name__ == "__main__":
    main()
