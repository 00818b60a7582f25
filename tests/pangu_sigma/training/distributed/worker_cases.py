"""One of several processes that train small models together, case by case, and write down what came of it.

    python -m tests.pangu_sigma.training.distributed.worker_cases CASES.json FOLDER

Started by `parallel.comm.launch.Launch`. Rank 0 also trains every case alone, on the same batches. Each rank writes
FOLDER/CASE-RANK.npz and rank 0 FOLDER/CASE-alone.npz: losses, norms, the first and last step's gradients, and the parts
of the final tensors that the rank would write to a checkpoint, each with the place it begins at.

A case with `saved_under` meshes is saved as a checkpoint, which is loaded and saved again under each of them and by one
process.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import numpy as np

DOMAINS = [0, 2, 1, 0, 2, 0, 1, 2]
EXPERTS = {"code": 4, "law": 1, "poems": 3}


def case_config(case: dict, processes):
    """The small configuration with eight experts a layer, changed as the case says, for these processes."""
    from pangu_sigma.config import config_from_dict, effective
    from tests.pangu_sigma.training.small_trainer import small_config

    sections = {name: case[name] for name in ("run", "data", "optimizer", "schedule", "experts") if name in case}
    train = {"batch_size": len(DOMAINS), **case.get("train", {})}
    values = small_config(case.get("model"), train=train, **sections).to_dict()
    for domain in values["domains"]:
        domain["experts"] = case.get("domains", EXPERTS)[domain["name"]]
    if case.get("emulate_mesh") and processes.size > 1:
        values["evaluate"]["every"] = None  # what follows from the mesh
        values["parallel"] = {**case.get("parallel", {}), **vars(processes.mesh), "emulate_mesh": True}
    return effective(config_from_dict(values))


def run_case(case: dict, processes, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Train the case's steps on `processes` and collect what this one has; save it in `folder` if there is one."""
    from pangu_sigma.checkpoint import LazyTensor
    from pangu_sigma.model.build_model import build_model
    from pangu_sigma.model.state_dict import tensor_parts
    from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
    from pangu_sigma.training.distributed.distributed_trainer import distributed_trainer
    from pangu_sigma.training.trainer import NO_REGULARISER
    from tests.pangu_sigma.training.small_trainer import EOD, batch, step_on

    config = case_config(case, processes)
    trainer = distributed_trainer(build_model(config, config.model.vocab_size, EOD, processes=processes))
    outputs: dict[str, np.ndarray] = {}
    model, apply = trainer.model, trainer.optimizer.apply
    shards = list(model.expert_shards.values())

    def noted(gradients, rate, scale, *rest):
        if step in (0, case["steps"] - 1):
            for parameter, tensor in zip(model.shared.trainable, gradients.shared, strict=True):
                name = parameter.name
                slices = model.shared.stored_slices(name)
                outputs[f"gradient {step} {name}"] = placed(tensor, model.shared.shapes[name], slices)
            for (layer_name, expert), tensors in gradients.experts.items():
                for part, tensor in enumerate(tensors):
                    if layer_name == DOMAIN_EMBEDDING:
                        outputs[f"gradient {step} {layer_name} {expert} {part}"] = tensor.asnumpy().copy()
                        continue
                    shard = shards[part]
                    full = placed(tensor, shard.shape, shard.slices)
                    outputs[f"gradient {step} {layer_name} {model.local_experts[expert]} {part}"] = full
        apply(gradients, rate, scale, *rest)

    regulariser = NO_REGULARISER
    if "held" in case:
        regulariser, fisher = make_regulariser(trainer, config, case["held"])
        outputs |= fisher
    trainer.optimizer.apply = noted
    results = []
    for step in range(case["steps"]):
        drawn = batch(step, case.get("drawn", {}).get(str(step), DOMAINS))
        local = drawn.rows(trainer.read_rows)
        if step == case.get("poisoned") and (processes.size == 1 or processes.rank == processes.size - 1):
            # One weight of the last expert, which one process alone holds.
            trainer.model.store.flush()
            trainer.model.store.table("blocks.0", "up.weight")[-1] = np.nan
        results.append(step_on(trainer, step, local, regulariser))
    if processes.mesh.placement_groups > 1:
        outputs["read"] = local.domain
        outputs["came_from"] = senders(processes)
    outputs["loss"] = np.array([r.loss for r in results])
    outputs["norm"] = np.array([r.gradient_norm for r in results])
    outputs["finite"] = np.array([r.finite for r in results])
    figures = trainer.take_record()
    outputs["tokens"] = np.array([figures["tokens"][n] for n in sorted(figures["tokens"])])
    outputs["figures"] = np.array(list(figures["figures"].values()))
    loads = figures.get("expert_load", {}).values()
    outputs["load"] = np.array([v for by in loads for n in by.values() for v in n])
    experts = figures.get("experts", {"activated": 0, "touched": 0})
    outputs["touched"] = np.array([experts["activated"], experts["touched"]])
    for name, part in tensor_parts(trainer.model, trainer.optimizer.moments()).items():
        for piece in part.local_shards:
            data = piece.data.read() if isinstance(piece.data, LazyTensor) else piece.data
            outputs[f"tensor {','.join(map(str, piece.offset))} {name}"] = data.copy()
    if folder is not None:
        save(trainer.model, trainer.optimizer, folder)
    if "measured" in case:
        outputs["measured"] = measured(trainer.model, case["measured"])
    trainer.model.store.close()
    return outputs


class Repeated:
    """Held-out text of random tokens, or of one that comes again and again."""

    def __init__(self, seed: int, one: bool) -> None:
        from tests.pangu_sigma.training.small_trainer import LENGTH, VOCAB

        draw = np.random.default_rng(seed)
        self.ids = draw.integers(3, VOCAB, (11, LENGTH + 1)).astype(np.int32)
        self.ids = np.full_like(self.ids, self.ids[0, 0]) if one else self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """As held-out sequences give it."""
        sequences = self.ids[start : start + count]
        ids, mask = np.zeros((count, self.ids.shape[1]), np.int32), np.zeros((count, self.ids.shape[1] - 1), np.float32)
        ids[: len(sequences)], mask[: len(sequences)] = sequences, 1.0
        return ids, mask


def measured(model, one: str) -> np.ndarray:
    """Losses of every domain's text, of which that of the domain `one` asks a single expert for all rows."""
    from pangu_sigma.evaluation.domain_evaluation import Evaluator
    from pangu_sigma.training.distributed.mesh_evaluation import MeshEvaluator

    heldout = {name: Repeated(domain_id, name == one) for domain_id, name in enumerate(model.groups.names)}
    kind = MeshEvaluator if model.config.sharded_over_devices else Evaluator
    evaluator = kind(model, 8)
    losses, tokens = evaluator.losses(heldout)
    if kind is MeshEvaluator:
        assert len(evaluator._graphs) == 2, "both graphs were wanted"
    return np.array([*losses.values(), *tokens.values()])


def placed(tensor, shape, part) -> np.ndarray:
    """A part of a tensor at its place in the whole one, which is NaN elsewhere."""
    full = np.full(shape, np.nan, np.float32)
    full[part] = tensor.asnumpy()
    return full


def make_regulariser(trainer, config, strengths: dict) -> tuple:
    """The regulariser with a teacher of another seed, and the Fisher information of two batches, which it uses."""
    from pangu_sigma.config import config_from_dict
    from pangu_sigma.config.training_sections import RegulariseConfig
    from pangu_sigma.model.build_model import build_model
    from pangu_sigma.training.continual.distillation import DistillationObjective
    from pangu_sigma.training.continual.fisher import estimate_fisher
    from pangu_sigma.training.continual.teacher import Teacher
    from pangu_sigma.training.continual.weight_penalty import WeightPenalty
    from pangu_sigma.training.trainer import Regulariser
    from tests.pangu_sigma.training.small_trainer import EOD, batch

    values = config.to_dict()
    values["run"]["seed"] = 7
    other = build_model(config_from_dict(values), config.model.vocab_size, EOD)
    rows, mesh = trainer.micro_batch, trainer.processes.mesh
    text = ((name, batch(100 + step, [0] * rows).tokens) for step, name in enumerate(("code", "poems")))
    fisher = estimate_fisher(trainer.model, text, 3, rows)
    previous = {p.name: p.asnumpy() for p in other.net.trainable_params()}
    parameters = trainer.model.net.trainable_params()
    penalty = WeightPenalty(parameters, previous, fisher, RegulariseConfig(**strengths), trainer.model.layout)
    teacher = Teacher(other, config, rows // mesh.rows)
    objective = DistillationObjective(teacher, strengths["output"], [0, 2], 3)
    return Regulariser(objective, penalty), {f"fisher {name}": values for name, values in fisher.items()}


def senders(processes) -> np.ndarray:
    """Of which ranks a training step's exchange brings rows here."""
    import mindspore as ms

    from parallel.comm.exchange import GatheredExchange

    exchange = GatheredExchange(processes.mesh, processes.rank, sum(EXPERTS.values())).set_train()
    sent = ms.Tensor(np.full((2, 1), processes.rank, np.float32))
    return np.unique(exchange(sent).asnumpy()).astype(int)


def save(model, optimizer, folder: Path) -> None:
    """A checkpoint of step 1 in the folder, by however many processes the model has."""
    from pangu_sigma.checkpoint import CheckpointContents, Fingerprints, save_checkpoint
    from pangu_sigma.checkpoint.distributed import save_distributed
    from pangu_sigma.model.state_dict import model_tensors, tensor_parts

    contents = CheckpointContents(
        step=1,
        domains=list(model.groups.names),
        coverage={
            layer_name: dict(zip(model.groups.names, model.groups.sizes, strict=True)) for layer_name in model.tables
        },
        config_text=model.config.to_yaml(),
        tokenizer_files={"tokenizer.json": b"{}"},
        probe={"law": np.arange(34, dtype=np.int32).reshape(2, 17)},
        state={"step": 1},
        fingerprints=Fingerprints(tokenizer="t", corpora=dict.fromkeys(model.groups.names, "c")),
    )
    how = {"keep": 2, "max_shard_bytes": 20_000}
    if model.processes.size == 1:
        save_checkpoint(folder, contents, model_tensors(model, optimizer.moments()), **how)
    else:
        save_distributed(model.processes, folder, contents, tensor_parts(model, optimizer.moments()), **how)


def save_again(case: dict, processes, source: Path, folder: Path) -> None:
    """Load the checkpoint that `source` holds on `processes`, and save what was loaded."""
    from pangu_sigma.checkpoint import StoredTensors, find_latest
    from pangu_sigma.model.build_model import build_model
    from pangu_sigma.model.state_dict import restore_model, stored_tables
    from pangu_sigma.training.optimizer import Optimizer
    from tests.pangu_sigma.training.small_trainer import EOD

    config = case_config(case, processes)
    tensors = StoredTensors(find_latest(source)[0])
    model = build_model(
        config, config.model.vocab_size, EOD, tables=stored_tables(tensors), initialise=False, processes=processes
    )
    optimizer = Optimizer(model)
    restore_model(model, tensors, optimizer_state=True)
    optimizer.restore(tensors, 1)
    save(model, optimizer, folder)
    model.store.close()


def on(met, mesh: dict):
    """The processes that have met, on another mesh."""
    from parallel.mesh import Mesh

    processes = copy.copy(met)
    processes.mesh = Mesh(**mesh)
    return processes


def main(cases: Path, folder: Path) -> None:
    from pangu_sigma import runtime
    from parallel.comm.launch import WATCHED, end_with_launcher
    from parallel.comm.processes import LaunchEnvironment, Processes
    from parallel.comm.watchdog import Watchdog
    from parallel.mesh import Mesh

    end_with_launcher()
    runtime.prepare("CPU")
    started = LaunchEnvironment.read()
    watch = Watchdog(Path(os.environ[WATCHED]), started.rank, started.size, timeout=600, quiet=True)
    met = Processes(Mesh(data=started.size), started.rank, watch)
    met.connect()
    alone: dict[str, dict[str, np.ndarray]] = {}  # one process's results do not depend on the mesh
    for name, case in json.loads(cases.read_text()).items():
        processes = on(met, case["mesh"])
        saved = folder / f"{name}-saved" if "saved_under" in case else None
        np.savez(folder / f"{name}-{started.rank}.npz", **run_case(case, processes, saved))
        for index, mesh in enumerate(case.get("saved_under", ())):
            save_again(case, on(met, mesh), saved, folder / f"{name}-saved-{index}")
        if started.rank == 0 and saved is not None:
            save_again(case, Processes(), saved, folder / f"{name}-saved-alone")
        if started.rank == 0 and case.get("alone", True):
            same = json.dumps({key: value for key, value in case.items() if key not in ("mesh", "saved_under")})
            if same not in alone:
                alone[same] = run_case(case, Processes())
            np.savez(folder / f"{name}-alone.npz", **alone[same])
    met.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
