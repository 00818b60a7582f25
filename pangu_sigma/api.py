"""The functions of `import pangu_sigma as ps`: the main jobs, each in one call that returns its figures. Those that
make a model of others, by domains, imports and conversions, are in `api_models`.

They print nothing: with `progress=True` a bar and messages go to stderr, or under the cell of a notebook. Otherwise
messages go to the logger `pangu_sigma`, as information or as warnings. Mistakes raise `UserError`, a `ValueError` that
says what to do. A result that lies in a folder is taken wherever a folder is asked for: `load(train(…))`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pangu_sigma.api_arguments import folder, items, path_or_none, run_folder
from pangu_sigma.errors import UserError, disk_errors_explained
from pangu_sigma.monitor.progress import progress_shown

if TYPE_CHECKING:
    from extract.export.export_job import Export
    from extract.extraction_job import Extraction
    from pangu_sigma.api_arguments import Overrides, PathLike
    from pangu_sigma.config import Config
    from pangu_sigma.evaluation.evaluation_result import DomainEvaluation
    from pangu_sigma.language_model import LanguageModel
    from pangu_sigma.new_configuration import NewConfiguration
    from pangu_sigma.serving.model_server import ModelServer
    from pangu_sigma.training.training_result import TrainingResult


@disk_errors_explained()
def load_config(source: PathLike | Mapping[str, Any] | Config, overrides: Overrides = ()) -> Config:
    """The effective configuration of a YAML file, of a mapping like its content, or of another configuration.

    overrides: `{"train.steps": 200, "domains.code.experts": 8}`, or texts as on the command line. Raises UserError
    naming the key and what is allowed.
    """
    from pangu_sigma.config import load_config

    return load_config(os.fspath(source) if isinstance(source, os.PathLike) else source, overrides)


@disk_errors_explained()
def init_config(folder: PathLike, data: PathLike | Sequence[PathLike], *, progress: bool = False) -> NewConfiguration:
    """Write the configuration `folder`/train.yaml for your own text, as `pangu-sigma init` does; `train` takes it.

    data: one domain each: a .txt or .jsonl file, or a folder of them. Raises UserError.
    """
    from pangu_sigma.new_configuration import write_configuration

    with progress_shown(progress):
        return write_configuration(Path(folder), [Path(source) for source in items(data)])


@disk_errors_explained()
def train(
    config: PathLike | Mapping[str, Any] | Config,
    overrides: Overrides = (),
    *,
    resume: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Train the model that a configuration describes, or with `resume` continue from its run's last checkpoint.

    config, overrides: as of `load_config`. workers: processes of this machine that share the work, as
    `parallel.workers` says if left out; above 1 they are started for this call. Ctrl-C in the main thread saves and
    returns; off the main thread signals are left alone. Raises UserError.
    """
    from pangu_sigma.training.job import train
    from pangu_sigma.workers import with_workers

    with progress_shown(progress):
        loaded = load_config(config, overrides)
        return train(loaded if workers is None else with_workers(loaded, workers), resume)


@disk_errors_explained()
def sft(
    model: PathLike, config: PathLike, overrides: Overrides = (), *, resume: bool = False, progress: bool = False
) -> TrainingResult:
    """Fine-tune a model on prompts with answers, as a YAML file like configs/sft.yaml says. Raises UserError."""
    return _adapt("sft", model, config, overrides, resume, progress)


@disk_errors_explained()
def dpo(
    model: PathLike, config: PathLike, overrides: Overrides = (), *, resume: bool = False, progress: bool = False
) -> TrainingResult:
    """Fine-tune a model on preferences between answers, as a YAML file like configs/dpo.yaml says. Raises UserError."""
    return _adapt("dpo", model, config, overrides, resume, progress)


def _adapt(
    objective: str, model: PathLike, config: PathLike, overrides: Overrides, resume: bool, progress: bool
) -> TrainingResult:
    from pangu_sigma.finetuning.finetuning_job import adapt

    with progress_shown(progress):
        return adapt(folder(model), Path(config), objective, overrides, resume)


@disk_errors_explained()
def load(
    model: PathLike,
    *,
    slots: int = 8,
    top: int = 1,
    prior: Literal["uniform", "updating", "cached"] = "uniform",
    prior_texts: PathLike | None = None,
) -> LanguageModel:
    """Load the model of a run's folder (its last checkpoint), a checkpoint or a model folder. Raises UserError.

    slots: prompts that are continued together. top, prior, prior_texts: how `domain="auto"` is inferred
    (docs/lifelong.md): so many of the likeliest domains write together; their prior, which is made of the texts of a
    file if it is cached.
    """
    from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
    from pangu_sigma.language_model import LanguageModel
    from pangu_sigma.serving.server_settings import MOST_SLOTS
    from pangu_sigma.trained_model import load_trained

    if not 1 <= slots <= MOST_SLOTS:
        raise UserError(f"slots is {slots}: give 1 to {MOST_SLOTS}")
    inference = DomainInferenceSettings(top, prior, path_or_none(prior_texts))
    return LanguageModel(load_trained(folder(model)), slots, inference)


@disk_errors_explained()
def evaluate(
    model: PathLike, *, batches: int | None = None, workers: int = 1, progress: bool = False
) -> DomainEvaluation:
    """Measure held-out loss per domain, and every domain's text under every expert group; a run keeps the result.

    batches: per text and group, 0 for all; what `evaluate.batches` says if left out. workers: processes that share the
    work. Raises UserError.
    """
    from pangu_sigma.evaluation.evaluation_job import evaluate

    with progress_shown(progress):
        result = evaluate(folder(model), batches, workers)
    assert result is not None  # of several processes, this is none
    return result


@disk_errors_explained()
def evaluate_tasks(
    model: PathLike,
    files: PathLike | Sequence[PathLike],
    *,
    shots: int = 0,
    shots_from: PathLike | None = None,
    domain: str | None = None,
    max_tokens: int = 64,
    stop: str | Sequence[str] = "\n",
    progress: bool = False,
) -> dict[str, Any]:
    """Let a model answer the questions of .jsonl files (docs/evaluation.md), and score every task.

    shots: solved questions in front of each, from the file `shots_from` or the task's own. domain: whose experts
    answer, or "auto". max_tokens, stop: end of a written answer. Raises UserError.
    """
    from pangu_sigma.evaluation.task_evaluation import FewShotSettings, evaluate_tasks

    settings = FewShotSettings(shots, path_or_none(shots_from), domain, max_tokens, tuple(items(stop)))
    with progress_shown(progress):
        return evaluate_tasks(folder(model), [Path(file) for file in items(files)], settings)


@disk_errors_explained()
def analyze(run: PathLike, *, tokens: int = 4096, progress: bool = False) -> dict[str, Any]:
    """Measure the routing of a run's checkpoints on so many held-out tokens of each domain, and keep it in the run.

    Returns what stands in its analysis.json (docs/evaluation.md). Raises UserError.
    """
    from pangu_sigma.evaluation.routing_analysis import analyze

    with progress_shown(progress):
        return analyze(run_folder(run), tokens)


@disk_errors_explained()
def plan_cluster(
    config: PathLike | Mapping[str, Any] | Config, overrides: Overrides = (), *, devices: int | None = None
) -> dict[str, Any]:
    """Estimate what a configuration needs on a cluster of Ascend devices: memory, bytes and time of a step.

    config, overrides: as of `load_config`. devices: as the configuration's mesh has them if left out. Raises UserError.
    """
    from pangu_sigma.plan.cluster_plan import plan
    from pangu_sigma.plan.hardware import Hardware

    return plan(load_config(config, overrides), Hardware(), devices)


@disk_errors_explained()
def extract(
    model: PathLike,
    domains: str | Sequence[str],
    out: PathLike,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    max_shard_size: int | str | None = None,
    fold: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> Extraction:
    """Cut domains out of a model: shared layers and their experts, a complete model in the new folder `out`.

    dtype: of the stored weights, as they are if left out. max_shard_size: largest file, in bytes or like "500MB"; the
    parent's files if left out. fold: turn groups of one expert into dense layers. verify: compare logits with the
    parent's before the folder gets its name. Raises UserError, and leaves nothing then.
    """
    from extract.extraction_job import extract, plan
    from pangu_sigma.checkpoint.file_size import parse_size

    with progress_shown(progress):
        shard = None if max_shard_size is None else parse_size(max_shard_size)
        cut = plan(folder(model), items(domains), Path(out), dtype=dtype, max_shard_bytes=shard, fold=fold)
        return extract(cut, Path(out), check=verify)


@disk_errors_explained()
def export(
    model: PathLike,
    format: Literal["hf", "hf-olmoe", "mindir", "onnx", "mindformers"],
    out: PathLike,
    *,
    domains: str | Sequence[str] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    max_shard_size: int | str = "4GiB",
    batch_size: int = 1,
    signature: Literal["plain", "sigma"] = "plain",
    capacity_factor: float | None = None,
    progress: bool = False,
) -> Export:
    """Write a model for another program into the new folder `out`, with its tokenizer (docs/export.md).

    domains: to take along, all if left out. dtype: of the weights, each its own if left out; dtype and max_shard_size
    are for hf and hf-olmoe; batch_size, signature and
    capacity_factor are for mindir. Raises UserError, and leaves nothing then.
    """
    from extract.export.export_formats import Options
    from extract.export.export_job import export
    from pangu_sigma.checkpoint.file_size import parse_size

    options = Options(dtype, parse_size(max_shard_size), batch_size, signature, capacity_factor)
    names = None if domains is None else items(domains)
    with progress_shown(progress):
        return export(folder(model), Path(out), format, names, options)


@disk_errors_explained()
def serve(
    model: PathLike,
    *,
    domains: str | Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    slots: int = 8,
    queue: int = 64,
    max_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    max_body: int = 1 << 20,
    grace: float = 30.0,
    warm_up: bool = True,
    top: int = 1,
    prior: Literal["uniform", "updating", "cached"] = "uniform",
    prior_texts: PathLike | None = None,
    block: bool = True,
    progress: bool = False,
) -> ModelServer:
    """Serve a model over HTTP in OpenAI's format: every domain is a model id, "auto" infers it (docs/serving.md).

    domains: offered ones, all if empty. token: that clients must present. slots: texts decoded together; queue: that
    may wait; max_tokens: most of one answer; max_prompt_tokens: most of a request's prompts; max_body: bytes of a
    request; grace: seconds that answers may go on when it stops. warm_up: compile all graphs before the first client.
    top, prior, prior_texts: as of `load`. block: return when Ctrl-C or SIGTERM came and the answers under way are done;
    else as soon as clients can come, and `server.stop()`, or the end of a `with` block, ends it. Raises UserError.
    """
    from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings
    from pangu_sigma.serving.model_server import ModelServer
    from pangu_sigma.serving.server_settings import ServerLimits, ServerSettings

    inference = DomainInferenceSettings(top, prior, path_or_none(prior_texts))
    limits = ServerLimits(
        slots=slots, queue=queue, max_tokens=max_tokens, prompt_tokens=max_prompt_tokens, body_bytes=max_body,
        grace_seconds=grace,
    )  # fmt: skip
    settings = ServerSettings(host, port, tuple(items(domains)), token, limits, warm_up, inference)
    with progress_shown(progress):
        server = ModelServer(folder(model), settings)
        server.run() if block else server.start()
    return server


@disk_errors_explained()
def read_metrics(run: PathLike) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl in the order in which they were written. Raises UserError."""
    from pangu_sigma.monitor.metrics_log import read_metrics

    return read_metrics(run_folder(run))


@disk_errors_explained()
def write_report(run: PathLike) -> Path:
    """Draw a run's curves and expert load as one HTML file and return its path. Raises UserError."""
    from pangu_sigma.report import write_report

    return write_report(run_folder(run))
