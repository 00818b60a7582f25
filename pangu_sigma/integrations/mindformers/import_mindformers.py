"""`pangu-sigma import mindformers`: a checkpoint that MindFormers wrote becomes a model folder.

MindFormers need not be installed. Names and shapes are ours already (see `mindformers_model`). Every tensor of the
model must be in the file, every tensor of the file is used or left behind by a named rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import Fingerprints, TensorSpec
from pangu_sigma.checkpoint.model_folder import check_output
from pangu_sigma.checkpoint.safetensors_header import StoredTensor, open_safetensors
from pangu_sigma.config import Config, with_vocabulary
from pangu_sigma.config.parameter_counts import parameter_counts, tensor_shapes
from pangu_sigma.convert.conversion_coverage import SkippedTensors, check_coverage
from pangu_sigma.convert.converted_folder import ConvertedModel, write_converted
from pangu_sigma.convert.finite_weights import check_finite
from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers.companion_files import find_companion, read_companion
from pangu_sigma.tensor_names import WORDS, is_routing, parse_name, tensor_name

SKIPPED = SkippedTensors(
    {
        "adam_m.*": (r"adam_m\..+", "first moments of the optimizer"),
        "adam_v.*": (r"adam_v\..+", "second moments of the optimizer"),
        "adam_steps.*": (r"adam_steps\..+", "the experts' update counts"),
        "counters": (
            r"epoch_num|step_num|global_step|global_batch_size|loss_scale|scale_sense|learning_rate"
            r"|(current_iterator_step|last_overflow_iterator_step|cur_iter|last_overflow_iter)",
            "counters of the training",
        ),
    }
)
ENDING = ".safetensors"
_STEP = re.compile(r"-(\d+)_(\d+)$")


@dataclass(frozen=True, repr=False)
class ImportedMindFormersRun(ConvertedModel):
    """The written folder, where it came from, and the tensors left behind by rule."""

    file: Path
    skipped: dict[str, int]


def import_mindformers(source: Path, out: Path, run: Path | None = None) -> ImportedMindFormersRun:
    """Write the model folder `out` from a checkpoint file, or from the newest of a MindFormers output folder.

    `run`: the output folder, where the file lies elsewhere. Raises UserError with the list of tensors unless every
    tensor of the model is there once and in its shape; nothing is written then.
    """
    out = check_output(out)
    file = checkpoint_file(source)
    companion = read_companion(find_companion(file, run))
    config = with_vocabulary(companion.config, companion.tokenizer.vocab_size)
    targets = tensor_shapes(config, config.model.vocab_size)
    groups = config.expert_groups
    tensors = open_safetensors(file)
    shapes = shapes_of(tensors)
    check_tensors(file, shapes, targets)
    skipped = {name: rule for name in shapes if (rule := SKIPPED.rule(name)) is not None}
    step = _step(file, tensors)

    def read(spec: TensorSpec) -> np.ndarray:
        array = _tensor(file, tensors[spec.name], spec)
        if is_routing(spec.name):
            _check_table(file, spec.name, array, groups)
        return array

    counts = parameter_counts(config, config.model.vocab_size)
    written = write_converted(
        out,
        config,
        "import",
        origin={"job": "import mindformers", "source": file.name, "step": step},
        card=_card(file, config, step, counts.total),
        read=read,
        tokenizer_files=companion.tokenizer.files(),
        fingerprints=Fingerprints(tokenizer=companion.tokenizer.fingerprint, corpora=companion.corpora),
        step=step,
        probe=companion.probe,
    )
    by_rule = {rule: sum(1 for r in skipped.values() if r == rule) for rule in dict.fromkeys(skipped.values())}
    return ImportedMindFormersRun(written, config, file, by_rule)


def checkpoint_file(source: Path) -> Path:
    """The checkpoint that `source` means: itself, or the one of the latest step in an output folder.

    Raises UserError.
    """
    if source.is_file():
        if source.suffix != ENDING:
            raise UserError(
                f"{source} is no {ENDING} file: let MindFormers write that (CheckpointMonitor's checkpoint_format: "
                "safetensors)"
            )
        return source
    if not source.is_dir():
        raise UserError(f"{source} does not exist: give a {ENDING} file or the output_dir of a MindFormers run")
    # Data-parallel processes each write the whole model; the first one's is taken.
    tensors = {
        (int(match[1]), int(match[2])): path
        for folder in (source / "checkpoint" / "rank_0", source / "rank_0", source)
        for path in folder.glob(f"*{ENDING}")
        if (match := _STEP.search(path.stem))
    }
    if not tensors:
        raise UserError(
            f"{source} holds no checkpoint of MindFormers (checkpoint/rank_0/*-EPOCH_STEP{ENDING}): give the file"
        )
    return tensors[max(tensors)]


def check_file(file: Path, config: Config) -> None:
    """Raises UserError unless the checkpoint holds every tensor of the model of `config`, of whatever vocabulary."""
    shapes = shapes_of(open_safetensors(file))
    words = shapes.get(WORDS) or shapes.get(tensor_name(WORDS, domain=config.domain_names[0])) or (0,)
    check_tensors(file, shapes, tensor_shapes(config, config.model.vocab_size or words[0]))


def shapes_of(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name of an opened file's tensors."""
    return {name: stored.shape for name, stored in tensors.items()}


def check_tensors(file: Path, shapes: dict[str, tuple[int, ...]], targets: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError unless every target is there in its shape and every other tensor is left behind by a rule."""
    used = [name for name in shapes if SKIPPED.rule(name) is None]
    check_coverage(str(file), targets, [(n, n, shapes[n]) for n in used if n in targets], used)


def _tensor(file: Path, stored: StoredTensor, spec: TensorSpec) -> np.ndarray:
    dtype = "int32" if spec.dtype == "int32" else "float32"
    if stored.dtype != dtype:
        raise UserError(f"{file} holds {spec.name} as {stored.dtype} where {dtype} is needed: save it in that type")
    return check_finite(str(file), spec.name, stored.read(spec.name))


def _step(file: Path, tensors: Mapping[str, StoredTensor]) -> int:
    """The step that the file is of, 0 where it does not say. Raises UserError for one that is no count."""
    stored = tensors.get("step_num")
    if stored is None:
        return 0
    if stored.shape not in ((), (1,)) or stored.dtype not in ("int32", "int64") or stored.read("step_num").min() < 0:
        raise UserError(f"{file} is damaged: step_num is no number of steps; give a whole checkpoint")
    return int(stored.read("step_num").reshape(()))


def _check_table(file: Path, name: str, table: np.ndarray, groups: dict[str, int]) -> None:
    experts = groups.get(parse_name(name).owner, sum(groups.values()))
    if table.size and (table.min() < 0 or table.max() >= experts):
        raise UserError(
            f"{file} is damaged: routing table {name} leads to experts outside its group of {experts}; give a whole "
            "checkpoint"
        )


def _card(file: Path, config: Config, step: int, parameters: int) -> str:
    per_domain = "".join(f"- {d.name}: {d.experts} experts in each sparse layer\n" for d in config.domains)
    return (
        f"# {file.name}, imported\n\n"
        f"A model of {parameters:,} parameters that MindFormers trained for {step} steps.\n\n"
        f"{per_domain}\n{config.model.layers} layers, {config.model.hidden} wide, vocabulary "
        f"{config.model.vocab_size:,}.\n"
    )
