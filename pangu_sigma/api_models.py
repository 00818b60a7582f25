"""The functions of `import pangu_sigma as ps` that make a model of others: domains added, removed or merged, imports,
upcycling, a larger vocabulary. They print nothing and raise UserError, as those of `api`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pangu_sigma.api_arguments import folder, items, path_or_none, run_folder
from pangu_sigma.errors import UserError, argument, disk_errors_explained
from pangu_sigma.monitor.progress import progress_shown

if TYPE_CHECKING:
    from pangu_sigma.api_arguments import Overrides, PathLike
    from pangu_sigma.config import Config
    from pangu_sigma.convert.converted_folder import ConvertedModel
    from pangu_sigma.convert.extend_vocabulary import ExtendedModel
    from pangu_sigma.convert.upcycle import UpcycledModel
    from pangu_sigma.domains.checkpoint_editor import EditResult
    from pangu_sigma.domains.list_domains import DomainFacts


@disk_errors_explained()
def list_domains(model: PathLike) -> list[DomainFacts]:
    """What every domain of a model owns, has seen in training, and its last loss. Raises UserError."""
    from pangu_sigma.domains.list_domains import list_domains

    return list_domains(folder(model))


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
    "from:DOMAIN", "nearest", "mean", "dense:MODEL" or "random". weight: how often it is drawn. steps: plan so many
    steps on the new domain instead of what the run had left, in which `shared` parameters stay frozen, train, or
    train near the model as it is now (`regularise`: weights of output, l2, ewc), with a share `replay` of the other
    domains' samples; `train(result.config_file, resume=True)` does them. out: write a new run there and leave this
    one as it is. No other domain's file changes by a byte. Raises UserError, and changes nothing then.
    """
    from pangu_sigma.config.domain_edits import plan_follow_up
    from pangu_sigma.domains.add_domain import NewDomain, add_domain

    texts = tuple(os.fspath(file) for file in items(data))
    new_domain = NewDomain(name, texts, experts, init, text_field, weight, filters, stars_field)
    follow_up = plan_follow_up(name, steps, shared, replay, regularise)
    with progress_shown(progress):
        return add_domain(run_folder(run), new_domain, follow_up=follow_up, out=path_or_none(out))


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
        return add_model(
            run_folder(run), folder(model), domain, name=name, weight=weight, follow_up=follow_up, out=path_or_none(out)
        )


@disk_errors_explained()
def remove_domain(run: PathLike, name: str, *, out: PathLike | None = None, progress: bool = False) -> EditResult:
    """Remove a domain with its experts and tables; all others stay as they are. `out` as of `add_domain`."""
    from pangu_sigma.domains.remove_domain import remove_domain

    with progress_shown(progress):
        return remove_domain(run_folder(run), name, out=path_or_none(out))


@disk_errors_explained()
def rename_domain(
    run: PathLike, name: str, to: str, *, out: PathLike | None = None, progress: bool = False
) -> EditResult:
    """Rename a domain: its tensors keep every byte under new names. `out` as of `add_domain`."""
    from pangu_sigma.domains.remove_domain import rename_domain

    with progress_shown(progress):
        return rename_domain(run_folder(run), name, to, out=path_or_none(out))


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
        return resize_domain(run_folder(run), name, experts, redraw=redraw, out=path_or_none(out))


@disk_errors_explained()
def merge_models(models: Sequence[PathLike], out: PathLike, *, progress: bool = False) -> EditResult:
    """Write a model folder with the domains of several models that have equal shared parameters. Raises UserError."""
    from pangu_sigma.domains.merge_models import merge_models

    with progress_shown(progress):
        return merge_models([folder(model) for model in items(models)], Path(out))


@disk_errors_explained()
def import_model(
    source: PathLike,
    format: Literal["hf", "pangu-alpha", "mindformers"],
    out: PathLike,
    *,
    tokenizer: PathLike | None = None,
    tokenizer_kind: Literal["pangu_alpha", "sentencepiece", "huggingface"] | None = None,
    eod_id: int | None = None,
    domain: str | None = None,
    data: PathLike | Sequence[PathLike] | None = None,
    heads: int | None = None,
    activation: Literal["gelu", "fast_gelu"] | None = None,
    strategy: PathLike | None = None,
    run: PathLike | None = None,
    progress: bool = False,
) -> ConvertedModel:
    """Import another model's weights into the new model folder `out`: an OLMoE of Hugging Face's ("hf"), a PanGu-α
    checkpoint of MindSpore, or what MindFormers trained (docs/conversion.md).

    tokenizer, tokenizer_kind, eod_id: its file, what that is, and its end-of-document id; "pangu-alpha" needs the file,
    vocab.model. domain, data: name of the model's one domain, and its texts for a later evaluation. heads, activation,
    strategy are for "pangu-alpha": attention heads of a size that was not published, gelu if left out, the shards'
    strategy file. run is for "mindformers": the run's output_dir, where the file lies elsewhere. Raises UserError, and
    leaves nothing then: every tensor is used, or left behind by a rule.
    """
    from pangu_sigma.convert.import_olmoe import OlmoeImportSettings, import_olmoe
    from pangu_sigma.convert.import_pangu_alpha import PanguAlphaImportSettings, import_pangu_alpha
    from pangu_sigma.integrations.mindformers.import_mindformers import import_mindformers

    known = {
        "hf": {field.name for field in fields(OlmoeImportSettings)},
        "pangu-alpha": {field.name for field in fields(PanguAlphaImportSettings)},
        "mindformers": {"run"},
    }
    if format not in known:
        raise UserError(f"{argument('format', format)} is unknown: choose one of {', '.join(known)}")
    settings: dict[str, Any] = {
        "tokenizer": path_or_none(tokenizer), "tokenizer_kind": tokenizer_kind, "eod_id": eod_id, "domain": domain,
        "data": None if data is None else tuple(os.fspath(text) for text in items(data)), "heads": heads,
        "activation": activation, "strategy": path_or_none(strategy), "run": path_or_none(run),
    }  # fmt: skip
    given = {name: value for name, value in settings.items() if value is not None}
    if foreign := given.keys() - known[format]:
        raise UserError(f"{argument(min(foreign))} is not for {format}: leave it out")
    if format == "pangu-alpha" and tokenizer is None:
        raise UserError(f"{argument('tokenizer')} is missing: give the path of PanGu-α's vocab.model")
    with progress_shown(progress):
        if format == "hf":
            return import_olmoe(Path(source), Path(out), OlmoeImportSettings(**given))
        if format == "pangu-alpha":
            return import_pangu_alpha(Path(source), Path(out), PanguAlphaImportSettings(**given))
        return import_mindformers(Path(source), Path(out), **given)


@disk_errors_explained()
def upcycle(
    dense: PathLike,
    config: PathLike | Mapping[str, Any] | Config,
    out: PathLike,
    overrides: Overrides = (),
    *,
    noise: float = 0.0,
    progress: bool = False,
) -> UpcycledModel:
    """Make a dense model the start of the sparse one that a configuration describes, in the new model folder `out`.

    Every expert begins as its layer's feed-forward network, so that both models give the same logits
    (`result.same_function`). config, overrides: as of `load_config`. noise: on every expert's weights, as a share of
    their standard deviation. Raises UserError, and leaves nothing then.
    """
    from pangu_sigma.convert.upcycle import upcycle

    source = Path(config) if isinstance(config, str | os.PathLike) else config
    with progress_shown(progress):
        return upcycle(folder(dense), source, Path(out), overrides, noise)


@disk_errors_explained()
def extend_vocabulary(
    model: PathLike,
    out: PathLike,
    *,
    pieces: PathLike | None = None,
    tokenizer: PathLike | None = None,
    piece_type: Literal["user-defined", "normal"] = "user-defined",
    initial: Literal["normal", "mean"] = "normal",
    skip_known: bool = False,
    progress: bool = False,
) -> ExtendedModel:
    """Add pieces to a model's tokenizer and rows to its embeddings, in the new model folder `out`; old ids stay.

    pieces: a file of new ones, one a line, of which `skip_known` passes over those that are there; or tokenizer: a
    SentencePiece model that begins with the model's own pieces. piece_type: taken wherever the text has it, or after
    all old pieces ("normal"). initial: new rows are drawn as for a new model, or the mean of the old ones. Raises
    UserError, and leaves nothing then.
    """
    from pangu_sigma.convert.extend_vocabulary import extend_vocabulary

    with progress_shown(progress):
        return extend_vocabulary(
            folder(model), Path(out), path_or_none(pieces), path_or_none(tokenizer), piece_type, initial, skip_known
        )
