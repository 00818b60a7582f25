"""The functions of `import pangu_sigma as ps`: the main jobs, each in one call that returns its figures.

They print nothing: with `progress=True` a bar and messages go to stderr, or under the cell of a notebook. Otherwise
messages go to the logger `pangu_sigma`, as information or as warnings. Mistakes raise `UserError`, a `ValueError` that
says what to do. A result that lies in a folder is taken wherever a folder is asked for: `load(train(…))`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pangu_sigma.errors import UserError, disk_errors_explained
from pangu_sigma.monitor.progress import progress_shown

if TYPE_CHECKING:
    from extract.export.export_job import Export
    from extract.extraction_job import Extraction
    from pangu_sigma.config import Config
    from pangu_sigma.domains.checkpoint_editor import EditResult
    from pangu_sigma.domains.list_domains import DomainFacts
    from pangu_sigma.evaluation.evaluation_result import DomainEvaluation
    from pangu_sigma.language_model import LanguageModel
    from pangu_sigma.new_configuration import NewConfiguration
    from pangu_sigma.serving.model_server import ModelServer
    from pangu_sigma.training.training_result import TrainingResult

    PathLike = str | os.PathLike[str]
    Overrides = Mapping[str, Any] | Iterable[str | tuple[str, Any]]

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
        return write_configuration(Path(folder), [Path(source) for source in _items(data)])


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
        return adapt(Path(model), Path(config), objective, overrides, resume)


@disk_errors_explained()
def load(model: PathLike, *, slots: int = 8) -> LanguageModel:
    """Load the model of a run's folder (its last checkpoint), a checkpoint or a model folder. Raises UserError.

    slots: prompts that are continued together.
    """
    from pangu_sigma.language_model import LanguageModel
    from pangu_sigma.trained_model import load_trained

    if slots < 1:
        raise UserError(f"slots is {slots}: give at least 1")
    return LanguageModel(load_trained(Path(model)), slots)


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
        result = evaluate(Path(model), batches, workers)
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

    settings = FewShotSettings(shots, _path(shots_from), domain, max_tokens, tuple(_items(stop)))
    with progress_shown(progress):
        return evaluate_tasks(Path(model), [Path(file) for file in _items(files)], settings)


@disk_errors_explained()
def analyze(run: PathLike, *, tokens: int = 4096, progress: bool = False) -> dict[str, Any]:
    """Measure the routing of a run's checkpoints on so many held-out tokens of each domain, and keep it in the run.

    Returns what stands in its analysis.json (docs/evaluation.md). Raises UserError.
    """
    from pangu_sigma.evaluation.routing_analysis import analyze

    with progress_shown(progress):
        return analyze(Path(run), tokens)


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
        cut = plan(Path(model), _items(domains), Path(out), dtype=dtype, max_shard_bytes=shard, fold=fold)
        return extract(cut, Path(out), check=verify)


@disk_errors_explained()
def export(
    model: PathLike,
    format: Literal["hf", "hf-olmoe", "mindir", "onnx", "mindformers"],
    out: PathLike,
    *,
    domains: str | Sequence[str] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    max_shard_size: int | str = "4GiB",
    batch_size: int = 1,
    signature: Literal["plain", "sigma"] = "plain",
    capacity_factor: float | None = None,
    progress: bool = False,
) -> Export:
    """Write a model for another program into the new folder `out`, with its tokenizer (docs/export.md).

    domains: to take along, all if left out. max_shard_size is for hf and hf-olmoe; batch_size, signature and
    capacity_factor are for mindir. Raises UserError, and leaves nothing then.
    """
    from extract.export.export_formats import Options
    from extract.export.export_job import export
    from pangu_sigma.checkpoint.file_size import parse_size

    options = Options(dtype, parse_size(max_shard_size), batch_size, signature, capacity_factor)
    names = None if domains is None else _items(domains)
    with progress_shown(progress):
        return export(Path(model), Path(out), format, names, options)


@disk_errors_explained()
def list_domains(model: PathLike) -> list[DomainFacts]:
    """What every domain of a model owns, has seen in training, and its last loss. Raises UserError."""
    from pangu_sigma.domains.list_domains import list_domains

    return list_domains(Path(model))


@disk_errors_explained()
def add_domain(
    run: PathLike,
    name: str,
    data: PathLike | Sequence[PathLike],
    *,
    experts: int = 4,
    init: str = "mean",
    text_field: str = "text",
    filters: Literal["none", "text", "code"] = "none",
    stars_field: str | None = None,
    weight: float = 1.0,
    steps: int | None = None,
    shared: Literal["frozen", "train", "regularised"] = "frozen",
    regularise: Mapping[str, float | str] | None = None,
    replay: float = 0.0,
    out: PathLike | None = None,
    progress: bool = False,
) -> EditResult:
    """Add a domain to a run: an expert group in every sparse layer with routing tables of its own.

    data: its text, .jsonl or .txt, globs too. experts: of its group in every sparse layer. init: how they begin:
    "from:DOMAIN", "mean", "dense:MODEL" or "random". weight: how often it is drawn. steps: plan so many steps on the
    new domain instead of what the run had left, in which `shared` parameters stay frozen, train, or train near the
    model as it is now (`regularise`: weights of output, l2, ewc), with a share `replay` of the other domains' samples;
    `train(result.config_file, resume=True)` does them. out: write a new run there and leave this one as it is. No other
    domain's file changes by a byte. Raises UserError, and changes nothing then.
    """
    from pangu_sigma.config.domain_edits import plan_follow_up
    from pangu_sigma.domains.add_domain import NewDomain, add_domain

    texts = tuple(os.fspath(file) for file in _items(data))
    new_domain = NewDomain(name, texts, experts, init, text_field, weight, filters, stars_field)
    follow_up = plan_follow_up(name, steps, shared, replay, regularise)
    with progress_shown(progress):
        return add_domain(Path(run), new_domain, follow_up=follow_up, out=_path(out))


@disk_errors_explained()
def add_domain_of_model(
    run: PathLike,
    model: PathLike,
    domain: str | None = None,
    *,
    name: str | None = None,
    weight: float = 1.0,
    steps: int | None = None,
    shared: Literal["frozen", "train", "regularised"] = "frozen",
    regularise: Mapping[str, float | str] | None = None,
    replay: float = 0.0,
    out: PathLike | None = None,
    progress: bool = False,
) -> EditResult:
    """Add a domain of another model that has the same shared parameters, under `name` (its own if left out).

    Other arguments as of `add_domain`. Raises UserError, and changes nothing then.
    """
    from pangu_sigma.config.domain_edits import plan_follow_up
    from pangu_sigma.domains.add_domain import add_model

    follow_up = plan_follow_up(name or "", steps, shared, replay, regularise)
    with progress_shown(progress):
        return add_model(Path(run), Path(model), domain, name=name, weight=weight, follow_up=follow_up, out=_path(out))


@disk_errors_explained()
def remove_domain(run: PathLike, name: str, *, out: PathLike | None = None, progress: bool = False) -> EditResult:
    """Remove a domain with its experts and tables; all others stay as they are. `out` as of `add_domain`."""
    from pangu_sigma.domains.remove_domain import remove_domain

    with progress_shown(progress):
        return remove_domain(Path(run), name, out=_path(out))


@disk_errors_explained()
def rename_domain(
    run: PathLike, name: str, to: str, *, out: PathLike | None = None, progress: bool = False
) -> EditResult:
    """Rename a domain: its tensors keep every byte under new names. `out` as of `add_domain`."""
    from pangu_sigma.domains.remove_domain import rename_domain

    with progress_shown(progress):
        return rename_domain(Path(run), name, to, out=_path(out))


@disk_errors_explained()
def resize_domain(
    run: PathLike,
    name: str,
    experts: int,
    *,
    redraw: bool = False,
    out: PathLike | None = None,
    progress: bool = False,
) -> EditResult:
    """Grow a domain's group to `experts` in every sparse layer; the model stays the same function until it trains.

    redraw: draw its tables anew instead of splitting the tokens of copied experts. `out` as of `add_domain`.
    """
    from pangu_sigma.domains.resize_domain import resize_domain

    with progress_shown(progress):
        return resize_domain(Path(run), name, experts, redraw=redraw, out=_path(out))


@disk_errors_explained()
def merge_models(models: Sequence[PathLike], out: PathLike, *, progress: bool = False) -> EditResult:
    """Write a model folder with the domains of several models that have equal shared parameters. Raises UserError."""
    from pangu_sigma.domains.merge_models import merge_models

    with progress_shown(progress):
        return merge_models([Path(model) for model in _items(models)], Path(out))


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
    warm_up: bool = True,
    block: bool = True,
    progress: bool = False,
) -> ModelServer:
    """Serve a model over HTTP in OpenAI's format: every domain is a model id, "auto" infers it (docs/serving.md).

    domains: offered ones, all if empty. token: that clients must present. slots: texts decoded together; queue: that
    may wait; max_tokens: most of one answer. warm_up: compile all graphs before the first client. block: return when
    Ctrl-C or SIGTERM came and the answers under way are done; else as soon as clients can come, and `server.stop()`,
    or the end of a `with` block, ends it. Raises UserError.
    """
    from pangu_sigma.serving.model_server import ModelServer
    from pangu_sigma.serving.server_settings import ServerLimits, ServerSettings

    limits = ServerLimits(slots=slots, queue=queue, max_tokens=max_tokens)
    settings = ServerSettings(host, port, tuple(_items(domains)), token, limits, warm_up)
    with progress_shown(progress):
        server = ModelServer(Path(model), settings)
        server.run() if block else server.start()
    return server


@disk_errors_explained()
def read_metrics(run: PathLike) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl in the order in which they were written. Raises UserError."""
    from pangu_sigma.monitor.metrics_log import read_metrics

    return read_metrics(Path(run))


@disk_errors_explained()
def write_report(run: PathLike) -> Path:
    """Draw a run's curves and expert load as one HTML file and return its path. Raises UserError."""
    from pangu_sigma.report import write_report

    return write_report(Path(run))


def _items(items: Any) -> list[Any]:
    """The items of a list; a text or path is one."""
    return [items] if isinstance(items, str | os.PathLike) else list(items)


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)
