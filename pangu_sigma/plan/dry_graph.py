"""In a dry process (`parallel.dry.process`): build the training graph of a configuration and let MindSpore compile it.

    python -m pangu_sigma.plan.dry_graph CONFIG.yaml RESULT.json

What it tells about itself goes to RESULT.json. The graphs of the step stay under `graphs/`, those of the update of the
shared parameters under `update/`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import mindspore as ms
from mindspore import Parameter, Tensor
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from pangu_sigma.config import Config, load_config, vocabulary_size
from pangu_sigma.model.build import build_model
from pangu_sigma.model.inputs import fixed_inputs
from pangu_sigma.train.objective import Objective
from pangu_sigma.train.step import GradientStep, SharedUpdate
from parallel.dry.graph import held, last_graph
from parallel.dry.process import start_semi_auto
from parallel.layout import MeshLayout

NESTED_CALLS = 100_000


def compile_step(config: Config) -> dict[str, object]:
    """Compile the step of one micro-batch; return its parameters and expert inputs before they are cut."""
    vocab = vocabulary_size(config)
    places = config.model.sparse_prefixes
    parallel = config.parallel
    layout = MeshLayout(parallel.mesh, config.run.device, parallel.sequence_parallel)
    with no_init_parameters():
        # Tables are no part of the graph, and neither are experts, which come as inputs.
        model = build_model(
            config, vocab, 0, tables={place: {} for place in places}, initialise=False, layout=layout, with_store=False
        )
        batch = config.train.batch_size // config.train.accumulation
        signature = model.training_signature(batch)
        fixed = fixed_inputs(batch, signature.length)
        cuts = [cut for _, _, cut in (*fixed.values(), *signature.cut_inputs())]
        start_semi_auto(
            tuple(layout.placed(cut) for cut in cuts),
            enable_parallel_optimizer=parallel.optimizer_parallel,
            gradients_mean=False,
        )
        if config.train.recompute:
            model.net.recompute_blocks()
        step = GradientStep(model.net, signature, layout, True, Objective())
    parameters = {p.name: p.shape for p in model.net.get_parameters()}
    given = {}
    for place, (_, first, _) in zip(signature.places, signature.bounds, strict=True):
        weights = place.reserved.weight_inputs(signature.hidden, signature.ffn)
        for number, (shape, _, _) in enumerate(weights):
            chunk, tensor = divmod(number, len(place.network.tensors))
            name = f"{place.name}.experts.{place.network.tensors[tensor]}/{chunk}"
            given[name] = (len(fixed) + first + number, shape)
    # A loop over tensors becomes calls inside calls: of several hundred parameters, more than MindSpore's own limit.
    ms.set_recursion_limit(NESTED_CALLS)
    started = time.perf_counter()
    step.compile(*step.get_inputs())
    compile_update(held(last_graph(Path("graphs/rank_0"))), layout)
    return {
        "seconds": time.perf_counter() - started,
        "parameters": parameters,
        "expert_inputs": given,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


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
