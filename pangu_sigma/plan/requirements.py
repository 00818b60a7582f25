"""What a job takes of the machine it starts on, by arithmetic before anything is built, and its refusal if the machine
has less.

The sums are those of the plan (`memory_estimate`), for the processes that share this machine. They stay below what a
job takes, so nothing is refused that would fit: the framework (0.7 GiB with its compiler), fragments and copies are not
counted. Training on CPU peaked, beyond those 0.7 GiB, at 1.0 to 1.3 times the sum where logits (200,000 words),
activations (65,536 tokens), parameters (78 M) or experts (134 M) made it up, and at 1.7 times it with those experts in
host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from pangu_sigma.checkpoint.disk_space import human_bytes
from pangu_sigma.config import Config, parameter_counts
from pangu_sigma.config.parameter_counts import check_number_of_tensors, counted_tensors
from pangu_sigma.errors import UserError, argument
from pangu_sigma.plan.hardware import Hardware
from pangu_sigma.plan.machine_limits import free_disk, memory_limit
from pangu_sigma.plan.memory_estimate import FLOAT32, MOMENTS, compute_bytes, device_bytes, host_bytes
from pangu_sigma.tensor_names import is_expert, parse_name

INT32 = 4
# Python's and the framework's objects for a layer's cells, and of a process that has loaded the framework: measured
# ones are several times larger.
LAYER_BYTES = 100_000
PROCESS_BYTES = 100_000_000

def process_memory(config: Config, vocabulary: int) -> dict[str, float]:
    """Bytes of one training process by what they are for. On Ascend the device's own memory is not counted."""
    counts, rows = parameter_counts(config, vocabulary), vocabulary * len(config.domains)
    samples, length = config.train.batch_size / config.parallel.mesh.rows, config.data.sequence_length
    ahead = min(config.data.prefetch, config.train.steps) + 1
    parts = {
        "the network": LAYER_BYTES * config.model.layers / config.parallel.mesh.pipeline,
        "routing tables": INT32 * counts.routing_entries,
        "batches": INT32 * ahead * samples * (length + 1),
        "word counts": 2 * INT32 * rows,
    }
    if config.run.device == "Ascend":
        return parts
    # Of a store outside the graph a step takes the experts that its tokens meet, which may be few.
    parts |= device_bytes(config if config.experts.store == "device" else _with_experts(config), vocabulary)
    if config.evaluate.every:
        parts["activations"] = max(parts["activations"], evaluation_bytes(config, vocabulary))
    return parts


def evaluation_bytes(config: Config, vocabulary: int) -> float:
    """Bytes of activations of a batch that is measured: the residual stream and the logits."""
    tokens = config.evaluate.batch_size / config.parallel.mesh.rows * config.data.sequence_length
    return tokens * (FLOAT32 * config.model.hidden + compute_bytes(config) * config.predictions * vocabulary)


def training_memory(config: Config, vocabulary: int) -> dict[str, float]:
    """Bytes of memory that a training run takes of this machine, by what they are for: those of its processes (the
    `parallel.workers`, or this one) and of the expert store that they share."""
    parts = {use: config.parallel.workers * size for use, size in process_memory(config, vocabulary).items()}
    parts["processes"] = PROCESS_BYTES * (config.parallel.workers - 1)
    # What a store on disk has in memory are pages of its files, which it can do without.
    in_memory = config.experts.store == "host"
    hardware = Hardware(devices_per_host=config.parallel.workers)
    return parts | {"expert store": host_bytes(config, hardware) if in_memory else 0.0}


def loading_memory(config: Config, vocabulary: int) -> dict[str, float]:
    """Bytes of memory of a trained model that computes without training."""
    counts = parameter_counts(config, vocabulary)
    parts = {"the network": float(LAYER_BYTES * config.model.layers), "routing tables": INT32 * counts.routing_entries}
    experts = sum(tensor.size for tensor in counted_tensors(config, vocabulary) if is_expert(tensor.name))
    parts["weights"] = FLOAT32 * (counts.total - experts)
    return parts | {"experts": 0.0 if config.experts.store == "disk" else FLOAT32 * experts}


def checkpoint_bytes(config: Config, vocabulary: int) -> dict[str, float]:
    """Bytes on disk of a new run: its first checkpoint, which holds every weight with its moments, and the files of an
    expert store on disk."""
    counts = parameter_counts(config, vocabulary)
    values = (1 + MOMENTS) * FLOAT32
    parts = {"a checkpoint": values * counts.total + INT32 * counts.routing_entries}
    experts = sum(tensor.size for tensor in counted_tensors(config, vocabulary) if is_expert(tensor.name))
    return parts | {"the expert store": values * experts if config.experts.store == "disk" else 0.0}


def check_training(config: Config, vocabulary: int | None = None, is_new: bool = True) -> None:
    """Refuse a training run that needs more memory or disk space than this machine has.

    vocabulary: None where the tokenizer is not made yet and the configuration does not tell its size; then what
    follows from it is not counted. is_new: its first checkpoint is still to come. Raises UserError with what is needed,
    what there is and the key to lower.
    """
    vocabulary = vocabulary or config.model.vocab_size or config.data.tokenizer.known_size or 1
    _check("memory", training_memory, config, vocabulary, memory_limit(), "this machine has")
    if is_new:
        folder = Path(config.run.dir)
        has = f"the disk of {folder} has free"
        _check("disk space", checkpoint_bytes, config, vocabulary, free_disk(folder), has)


def check_loading(config: Config, model: Path, processes: int = 1) -> None:
    """Refuse to build the trained model of the folder `model` if it needs more memory than this machine has.

    processes: that build it, each its part of the experts. Raises UserError with both numbers.
    """
    parts, limit = loading_memory(config, config.model.vocab_size or 1), memory_limit()
    parts["experts"] /= processes
    if sum(parts.values()) > limit:
        raise UserError(
            f"{model} needs {_amount(parts, 'memory')}, and this machine has {human_bytes(limit)}: extract one of its "
            "domains, or use a machine with more memory"
        )


def check_processes(workers: int) -> None:
    """Refuse so many processes of one job if they alone take more memory than this machine has. Raises UserError."""
    needed, limit = workers * PROCESS_BYTES, memory_limit()
    if needed > limit:
        raise UserError(
            f"{argument('workers', workers)} starts processes that need {human_bytes(needed)} of memory before they "
            f"compute, and this machine has {human_bytes(limit)}: start fewer"
        )


def check_network(config: Config) -> None:
    """Refuse to compile the network of a pipeline stage whose layers alone take more memory than this machine has, or
    that has more tensors than can be listed. Raises UserError."""
    check_number_of_tensors(config)
    needed, limit = LAYER_BYTES * config.model.layers / config.parallel.mesh.pipeline, memory_limit()
    if needed > limit:
        raise UserError(
            f"model.layers = {config.model.layers} asks too much: to compile it takes {human_bytes(needed)} of memory, "
            f"and this machine has {human_bytes(limit)}; lower model.layers"
        )


def check_group(config: Config, experts: int, folder: Path) -> None:
    """Refuse an expert group of a model of `config` that does not fit on the disk of `folder` in the smallest type.

    experts: of every sparse layer. Raises UserError with both numbers.
    """
    first = config.domains[0].name
    tensors = (tensor for tensor in counted_tensors(config, 1) if parse_name(tensor.name).domain == first)
    values = sum(tensor.size // tensor.shape[0] for tensor in tensors if is_expert(tensor.name))
    needed, free = 2 * experts * values, free_disk(folder)
    if needed > free:
        raise UserError(
            f"a group of {experts} experts needs {human_bytes(needed)} of disk space, and the disk of {folder} has "
            f"{human_bytes(free)} free: lower {argument('experts')}"
        )


def check_caches(config: Config, rows: int, length: int) -> None:
    """Refuse a batch of `rows` texts of up to `length` tokens whose keys and values take more memory than there is.

    Raises UserError with both numbers.
    """
    needed = rows * length * 2 * config.model.layers * config.model.hidden * compute_bytes(config)
    if needed > (limit := memory_limit()):
        raise UserError(
            f"keys and values of {rows} texts of {length} tokens together need {human_bytes(needed)} of memory, and "
            f"this machine has {human_bytes(limit)}: lower {argument('slots')}"
        )


def _check(
    kind: str, requirement: Callable[[Config, int], Mapping[str, float]], config: Config, vocabulary: int,
    limit: int, owner: str,
) -> None:  # fmt: skip
    parts = requirement(config, vocabulary)
    if sum(parts.values()) > limit:
        left = {setting: sum(requirement(*lower).values()) for setting, lower in _lowered(config, vocabulary)}
        # The first key that is enough alone, or by which most is saved.
        setting = next((key for key, needed in left.items() if needed <= limit), min(left, key=left.__getitem__))
        raise UserError(
            f"{setting} asks too much: the run needs {_amount(parts, kind)}, and {owner} {human_bytes(limit)}; lower "
            f"{setting.split(' ')[0]}, or see with pangu-sigma plan what a larger machine or a cluster needs"
        )


def _amount(parts: Mapping[str, float], kind: str) -> str:
    """`3.2 TiB of memory (moments 1.2 TiB, weights 0.6 TiB)`: with the largest two parts."""
    largest = sorted(((size, use) for use, size in parts.items() if size), reverse=True)[:2]
    listed = ", ".join(f"{use} {human_bytes(size)}" for size, use in largest)
    return f"{human_bytes(sum(parts.values()))} of {kind} ({listed})"


def _lowered(config: Config, vocabulary: int) -> Iterator[tuple[str, tuple[Config, int]]]:
    """`key = value` of each key that can be lowered, and the configuration and vocabulary with its smallest number; in
    the order in which one would try them. For arithmetic alone: whether the rules hold is not asked."""
    train, rows = config.train, config.parallel.mesh.rows
    smallest = {
        "data.prefetch": {"data.prefetch": 0},
        "evaluate.batch_size": {"evaluate.batch_size": rows},
        "parallel.workers": {"parallel.workers": 1},
        "train.batch_size": {"train.batch_size": rows * train.gradient_accumulation_steps},
        "data.sequence_length": {"data.sequence_length": 2},
        "model.positions": {"model.positions": 2, "data.sequence_length": 2},
        "model.layers": {"model.layers": 2, "model.sparse.layers": 1},
        "model.ffn": {"model.ffn": 1},
        "model.hidden": {"model.hidden": 1},
    }
    for key, numbers in smallest.items():
        yield f"{key} = {attrgetter(key)(config)}", (_at_most(config, numbers), vocabulary)
    if config.model.vocab_size is not None:
        yield f"model.vocab_size = {vocabulary}", (config, 1)
    elif config.data.tokenizer.vocab_size is not None:
        yield f"data.tokenizer.vocab_size = {vocabulary}", (config, 1)
    if config.model.sparse_prefixes:
        largest = max(config.domains, key=lambda domain: domain.experts)
        yield f"domains.{largest.name}.experts = {largest.experts}", (_with_experts(config), vocabulary)


def _with_experts(config: Config) -> Config:
    """The configuration with the smallest expert groups that its mesh divides."""
    most = config.parallel.mesh.expert
    domains = (domain.model_copy(update={"experts": min(domain.experts, most)}) for domain in config.domains)
    return config.model_copy(update={"domains": tuple(domains)})


def _at_most(section: Any, numbers: Mapping[str, int]) -> Any:
    """The section with at most these numbers at their keys."""
    for key, most in numbers.items():
        name, _, rest = key.partition(".")
        value = getattr(section, name)
        section = section.model_copy(update={name: _at_most(value, {rest: most}) if rest else min(value, most)})
    return section
