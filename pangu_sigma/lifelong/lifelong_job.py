"""The whole measurement: stages trained and measured one after the other, resumable at any moment.

What lies in the folder `run.dir`: `plan.json`; `tokenizer/`, fixed before the first stage; `data/`, the tokenised text;
`stages/NN-name/`, a run for every stage, with `measured.json` once it is measured; and after every stage
`lifelong.json`, `matrix.csv`, `matrix.svg` and `report.html` of what is finished so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pangu_sigma import runtime
from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.config import config_from_dict
from pangu_sigma.config.config_paths import resolve_stored_paths
from pangu_sigma.config.differences import joined
from pangu_sigma.config.resume_rules import changed_keys
from pangu_sigma.data.corpus_files import expand_paths
from pangu_sigma.data.packed_sequences import HeldoutSequences
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_registry import load_tokenizer
from pangu_sigma.data.tokenizers.tokenizer_training import build_tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.lifelong.lifelong_page import render
from pangu_sigma.lifelong.lifelong_results import Results
from pangu_sigma.lifelong.loss_heat_map import heat_map
from pangu_sigma.lifelong.stage_cost import domain_costs, learning, parameter_hashes, stage_cost
from pangu_sigma.lifelong.stage_plan import Plan, Stage
from pangu_sigma.lifelong.train_stage import finished, train_stage
from pangu_sigma.monitor.progress import progress
from pangu_sigma.monitor.result_files import read_json, write_json, write_text
from pangu_sigma.plan.requirements import check_training
from pangu_sigma.signals import stop_signals_raise
from pangu_sigma.training.task import prepare_with_progress

PLAN, MEASURED, UNTRAINED = "plan.json", "measured.json", "untrained.json"
PREPARED = (PLAN, UNTRAINED, "data", "mindspore", "tokenizer")  # before the first stage
RESULTS, TABLE, MAP, PAGE = "lifelong.json", "matrix.csv", "matrix.svg", "report.html"


def run_lifelong(plan: Plan, say: Callable[[str], None] = print) -> Results:
    """Do what is left of the plan and return the results; `Results.complete` tells whether a signal cut it short.

    Finished stages are not repeated. `say` tells which stage begins. Raises UserError; what was finished before stays.
    """
    for domain in plan.base.domains:
        expand_paths(domain.name, domain.data)  # text that is not there is found before a folder is made
    for stage in plan.stages:
        check_training(plan.config(stage), is_new=not plan.run_dir(stage).exists())
    with stop_signals_raise(), lock_run_folder(plan.dir, prepared=PREPARED):
        _check_plan(plan)
        measurement = _Measurement(plan)
        results = measurement.results([])
        checkpoints: list[Checkpoint] = []
        for stage in plan.stages:
            if finished(plan, stage) is None:
                say(f"Stage {stage.number + 1} of {len(plan.stages)}: {stage.name}")
            checkpoint, stop_signal = train_stage(plan, stage, measurement.tokenizer_path)
            if stop_signal is not None:
                return replace(results, stop_signal=stop_signal)
            if checkpoint is None:
                break
            measurement.measure(stage, checkpoint, checkpoints[-1] if checkpoints else None)
            checkpoints.append(checkpoint)
            results = measurement.results(checkpoints)
            write_results(plan.dir, results)
        return results


def write_results(folder: Path, results: Results) -> None:
    """Write JSON, CSV, heat map and page of what is finished so far."""
    write_json(folder / RESULTS, results.to_dict())
    write_text(folder / TABLE, results.csv())
    write_text(folder / MAP, heat_map([results.panel]))
    write_text(folder / PAGE, render(results, folder.resolve().name))


class _Measurement:
    """Holds the domains' text and measures models on it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tokenizer_path, tokenizer = _tokenizer(plan)
        self.corpus = prepare_with_progress(plan.base, tokenizer)
        self.heldout = self.corpus.heldout()
        self.unigram = self.corpus.unigram_losses(plan.measure_batches)
        self.heldout_bytes = self.corpus.heldout_bytes(plan.measure_batches)
        self.untrained = self._untrained()

    def results(self, checkpoints: list[Checkpoint]) -> Results:
        """The results of the first stages, whose last checkpoints these are."""
        plan = self.plan
        texts = {store.name: store.tokens["train"] for store in self.corpus.stores}
        done = plan.stages[: len(checkpoints)]
        return Results(
            plan=plan.to_dict(),
            learned=plan.learned,
            by_domain=plan.by_domain,
            untrained=self.untrained,
            rows=[read_json(plan.run_dir(stage) / MEASURED)["row"] for stage in done],
            costs=[
                stage_cost(plan, stage, checkpoints[n], checkpoints[n - 1] if n else None)
                for n, stage in enumerate(done)
            ],
            unigram=self.unigram,
            heldout_bytes=self.heldout_bytes,
            domain_costs=domain_costs(checkpoints[-1]) if checkpoints else {},
            learning=[learning(plan, stage, checkpoints[n], texts) for n, stage in enumerate(done)],
        )

    def measure(self, stage: Stage, checkpoint: Checkpoint, before: Checkpoint | None) -> None:
        """Measure a finished stage, unless it was with the same model, text and settings; the stage before it ended
        with `before`."""
        path = self.plan.run_dir(stage) / MEASURED
        of = {"checkpoint": checkpoint.sha256, **self._settings()}
        if (read_json(path) or {}).get("of") != of:
            from pangu_sigma.trained_model import trained_from

            kept = self._kept(stage, checkpoint, before)
            texts = {name: text for name, text in self.heldout.items() if name not in kept}
            row = self._row(trained_from(checkpoint).model, f"measure {stage.name}", texts) | kept
            write_json(path, {"of": of, "row": {name: row[name] for name in self.heldout}})

    def _kept(self, stage: Stage, checkpoint: Checkpoint, before: Checkpoint | None) -> dict[str, dict]:
        """With measure: new, the losses of the stage before that hold: of domains that this stage does not learn and
        all of whose parameters, shared and own, are the same by their hashes."""
        if self.plan.measure != "new" or before is None or not self.plan.by_domain:
            return {}
        from pangu_sigma.lifelong.matrix_row import UNCHANGED

        row = read_json(self.plan.run_dir(self.plan.stages[stage.number - 1]) / MEASURED)["row"]
        same = [
            name
            for name in before.domains
            if name not in stage.domains and parameter_hashes(before, name) == parameter_hashes(checkpoint, name)
        ]
        return {name: row[name] | {"how": UNCHANGED} for name in same if name in row}

    def _untrained(self) -> dict[str, Any]:
        """The row of the first stage's model before its first step."""
        plan = self.plan
        path = plan.dir / UNTRAINED
        stage = plan.stages[0]
        config = plan.config(stage, self.tokenizer_path).to_dict()
        config["model"]["vocab_size"] = config["model"]["vocab_size"] or self.corpus.tokenizer.vocab_size
        of = {"model": config["model"], "seed": config["run"]["seed"], "domains": list(plan.domains_after(stage))}
        of |= {"experts": [entry["experts"] for entry in config["domains"]], **self._settings()}
        if (read_json(path) or {}).get("of") != of:
            model = self._build(config)
            write_json(path, {"of": of, "row": self._row(model, "measure untrained", self.heldout)})
        return read_json(path)["row"]

    def _build(self, values: Mapping[str, Any]):
        config = config_from_dict(values)
        runtime.prepare(config.run.device, self.plan.dir / "mindspore")
        from pangu_sigma.model.build_model import build_model

        vocab = config.model.vocab_size
        counts = self.corpus.token_counts(vocab)
        return build_model(config, vocab, self.corpus.tokenizer.eod_id, token_counts=counts, inference=True)

    def _row(self, model, what: str, texts: Mapping[str, HeldoutSequences]) -> dict[str, dict]:
        from pangu_sigma.lifelong.matrix_row import RowMeasurement

        plan = self.plan
        size, own_only = plan.base.evaluate.batch_size, plan.measure != "all"
        measurement = RowMeasurement(
            model, plan.by_domain, plan.inference, plan.measure_batches, size, own_only=own_only
        )
        try:
            with progress(what, measurement.work(texts), unit="batches") as job:
                return measurement.row(texts, job.advance)
        finally:
            model.store.close()

    def _settings(self) -> dict[str, Any]:
        """What a row depends on besides the model."""
        plan = self.plan
        return {
            "evaluate": {"batches": plan.measure_batches, "batch_size": plan.base.evaluate.batch_size},
            "inference": plan.inference.model_dump(mode="json"),
            **({} if plan.measure == "all" else {"measure": plan.measure}),
            "text": {store.name: store.fingerprint for store in self.corpus.stores},
        }


def _check_plan(plan: Plan) -> None:
    """Compare with the plan that the folder holds, and keep the new one. Raises UserError for what was begun."""
    path = plan.dir / PLAN
    stored, planned = read_json(path), plan.to_dict()
    if stored:
        begun = [index for index, stage in enumerate(plan.stages) if plan.run_dir(stage).is_dir()]
        _check_stages(plan, stored, planned, max(begun, default=-1) + 1)
        _check_base(plan, stored)
    write_json(path, planned)


def _check_stages(plan: Plan, stored: Mapping[str, Any], planned: Mapping[str, Any], begun: int) -> None:
    folders = [f"{n + 1:02d}-{stage['name']}" for n, stage in enumerate(stored["stages"])]
    begun = max([begun, *(n + 1 for n, name in enumerate(folders) if (plan.dir / "stages" / name).is_dir())])
    for index in range(begun):
        old = stored["stages"][index] if index < len(stored["stages"]) else None
        new = planned["stages"][index] if index < len(planned["stages"]) else None
        if old != new:
            name = (old or new)["name"]
            raise UserError(
                f"stage {index + 1} ({name}) of {plan.dir} was begun with other values: restore them, change only "
                "stages that have not begun, or choose another run.dir"
            )


def _check_base(plan: Plan, stored: Mapping[str, Any]) -> None:
    path = plan.dir / PLAN
    old = config_from_dict(resolve_stored_paths(dict(stored["base"]), path), source=str(path))
    refused = changed_keys(old, plan.base, step=0).refused
    if plan.grows:
        # More domains may come; those there are stay what they were.
        names, now = old.domain_names, plan.base.domain_names
        if set(names) <= set(now):
            new = tuple(f"domains.{name}." for name in now if name not in names)
            refused = [change for change in refused if change.key != "domains" and not change.key.startswith(new)]
    if refused:
        raise UserError(
            f"the stages of {plan.dir} cannot go on with other values: {joined(refused)}; restore them or choose "
            "another run.dir"
        )


def _tokenizer(plan: Plan) -> tuple[Path | None, Tokenizer]:
    """The tokenizer of all stages, trained once on the mix of all domains' text where the configuration trains one.

    Returns its model file too, None where the configuration names a file itself.
    """
    section, cache = plan.base.data.tokenizer, Path(plan.base.data.cache)
    if section.kind != "train":
        return None, build_tokenizer(section.kind, (), cache, section.path, eod=section.eod)
    folder = plan.dir / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        build_tokenizer("train", plan.base.domains, cache, None, section.vocab_size).save(folder)
    return folder / "tokenizer.model", load_tokenizer(folder)
