"""The systems that learn four real domains one after another, as files of stages; and the text they learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pangu_sigma.data.builtin_corpora import build
from pangu_sigma.monitor.result_files import write_text

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "data" / "corpora"
DOMAINS = ("code", "math_en", "drama_en", "poetry_zh")
EXPERTS = 4  # of each domain, and of each domain's share of a gate's experts

# About 3 M active parameters per token, in every system.
SIZES = [
    "model.layers=5", "model.hidden=192", "model.heads=4", "model.ffn=768", "model.positions=128",
    "data.sequence_length=128", "data.tokenizer.vocab_size=4096", "train.batch_size=16", "optimizer.learning_rate=2e-3",
]  # fmt: skip
AROUND = [
    "run.tensorboard=false", "evaluate.every=0", "evaluate.batches=8", "evaluate.batch_size=16", "checkpoint.keep=1",
]  # fmt: skip
DENSE = ["model.sparse.layers=0", "model.sparse.table=uniform"]
RRE = ["model.sparse.layers=2"]
OWN_WORDS = [*RRE, "model.domain_parameters.embedding=own"]
# What --quick learns: a base of two domains, then the other two; and by whom.
QUICK_STAGES = (("code", "math_en"), ("drama_en",), ("poetry_zh",))
QUICK_SYSTEMS = ("dense", "dense_replay", "rre_frozen", "rre_own", "dense_joint", "rre_joint")


def gated(router: str) -> list[str]:
    """Two sparse layers of 4 blocks, as the system's paper has them, in every other layer."""
    return [f"model.sparse.router={router}", "model.sparse.pattern=every_other", "model.sparse.layers=0",
            "model.sparse.table=uniform"]  # fmt: skip


@dataclass(frozen=True)
class System:
    """One way to learn a sequence of domains: its name in tables, its model, its stages' policy.

    joint: all domains at once, for as many steps as the stages together: what a model could know that never forgets.
    """

    title: str
    model: list[str]
    policy: dict[str, Any] = field(default_factory=dict)
    grows: bool | None = None
    joint: bool = False


def systems(replay: float, ewc: float, output: float) -> dict[str, System]:
    """Every system by its short name; the arguments are the strengths of the three that hold on to the old domains."""
    return {
        "dense": System("dense, fine-tuned", DENSE),
        "dense_replay": System(f"dense, {100 * replay:.0f} % replay", DENSE, {"replay": replay}),
        "dense_ewc": System(f"dense, EWC {ewc:g}", DENSE, {"shared": "regularised", "regularise": {"ewc": ewc}}),
        "switch": System("Switch", gated("switch")),
        "lifelong_moe": System(
            # Its gate gives a token two experts: they, and the dense layers, are narrower, to meet as many parameters.
            f"Lifelong-MoE, output {output:g}", [*gated("gshard"), "model.ffn=552"],
            {"shared": "regularised", "regularise": {"output": output}}, grows=True,
        ),
        "rre_trained": System("RRE, shared trained", RRE, {"shared": "train"}),
        "rre_frozen": System("RRE, shared frozen", RRE, {"shared": "frozen"}),
        "rre_own": System("RRE, shared frozen, own words", OWN_WORDS, {"shared": "frozen"}),
        "dense_joint": System("dense, all at once", DENSE, joint=True),
        "rre_joint": System("RRE, all at once", RRE, joint=True),
    }  # fmt: skip


def missing_text() -> list[Path]:
    """Files of the three shared domains that are not here."""
    return [path for name in DOMAINS[1:] if not (path := SHARED / f"{name}.jsonl").is_file()]


def prepare_text(folder: Path) -> dict[str, Path]:
    """Domain -> its text; code is Python's own library, written to `folder`."""
    code = build(folder)["code"]
    return {"code": code, **{name: SHARED / f"{name}.jsonl" for name in DOMAINS[1:]}}


def write_stages(
    system: System, folder: Path, text: dict[str, Path], seed: int, steps: int, small: bool, quick: bool = False
) -> Path:
    """Write the file of stages of one system and seed; its measurement will lie in `folder`.

    steps: for each domain. small: a model that shows in minutes that everything works, and nothing else. quick: the
    first two domains at once, and every text read by its own domain's experts alone.
    """
    domains = [{"name": name, "data": [str(path.resolve())], "experts": EXPERTS} for name, path in text.items()]
    changes = [
        f"run.dir={folder}", f"run.seed={seed}", f"data.cache={folder.parent / 'cache'}", f"domains={domains}",
        *SIZES, *AROUND, *system.model,
        f"schedule.warmup_steps={max(1, steps // 5)}", f"checkpoint.every={max(1, steps // 2)}",
    ]  # fmt: skip
    if small:
        changes += ["model.layers=3", "model.hidden=32", "model.ffn=64", "data.tokenizer.vocab_size=2048",
                    "train.batch_size=4", "evaluate.batches=2", "evaluate.batch_size=4"]  # fmt: skip
        changes += ["model.sparse.layers=1"] if system.model in (RRE, OWN_WORDS) else []
    learned = QUICK_STAGES if quick else [(name,) for name in DOMAINS]
    stages = [{"domains": list(names), "steps": steps * len(names)} for names in learned]
    if system.joint:
        stages = [{"name": "all", "domains": list(DOMAINS), "steps": steps * len(DOMAINS)}]
    values = {
        "schema_version": 2,
        "base": str(HERE / "four_domains.yaml"),
        "changes": changes,
        "grows": system.grows,
        "policy": system.policy,
        "inference": {"top": len(DOMAINS)},
        "measure": "own" if quick else "all",
        "stages": stages,
    }
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return path
