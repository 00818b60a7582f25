"""Proof that a refactoring changed nothing: two commits trained, extracted and exported, compared to the bit.

    python -m benchmarks.compare_commits OLD [NEW] [--speed] [--rounds 9] [--steps 20] [--work DIR]

OLD and NEW are commits (or branches, tags) of this repository; without NEW it is the work tree as it stands, changes
that are not committed included. Each is installed into a folder of its own, compiled kernels included, and runs there
with this interpreter and the dependencies that are installed beside it. The two are talked to by their command lines
and files only, because modules may have moved between them.

Each trains its own configs/quickstart.yaml for `--steps` steps on the same corpora, extracts one domain, exports that,
and generates a text. Compared are

- all numbers of metrics.jsonl (losses, gradient norms, expert loads, ...) except times, speeds and file sizes,
- all tensors of checkpoint (optimizer state included) and extraction: name, type, shape, bytes,
- the exported weights byte for byte (of MINDIR, whose bytes change with every export: parameters and operators; of
  ONNX, whose operators depend on how the graph is made: what it computes for a text),
- the generated token ids and their log-probabilities.

Text files (README.md, config.yaml, manifest.json, ...) may differ, because they hold key names and hashes of such
files; the table says in how many lines. A metric that got another name, with the same numbers, is reported and counts
as equal. It takes five minutes.

With --speed both are then measured in turns, `--rounds` times: tokens per second of training (median over the steps
after the warm-up) and of decoding through the server, one text and eight texts at a time. The median of the rounds'
ratios NEW / OLD must be at least 0.97. It takes two minutes a round and means nothing on a machine that does other
work.

Prints Markdown tables; progress goes to stderr. Exit status: 0 if equal (and as fast), 1 if not, 2 if a command fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from benchmarks.commit_checkout import Checkout, CommandFailed, add_checkout, common_overrides
from benchmarks.commit_results import Comparison, compare_folders, compare_json, compare_metrics, results_table
from benchmarks.commit_speed import measure_speeds, speeds_table
from extract.export.export_formats import FORMATS as EXPORT_FORMATS
from pangu_sigma.monitor.progress import progress

DOMAIN = "code"
PROMPT = "def "
RUN, EXTRACTION = "run", "extraction"
FORMATS = ("hf", "mindir", "onnx")  # exported where the packages that write them are installed


def training_overrides(steps: int) -> dict[str, str]:
    """Changes to the quickstart: few steps, all of them logged, evaluated twice, with warm-up and decay."""
    return {
        "run.dir": RUN,
        "run.log_every": "1",
        "train.steps": str(steps),
        "schedule.warmup_steps": str(steps // 4),
        "evaluate.every": str(max(1, steps // 2)),
        "checkpoint.every": "0",
    }


def jobs(steps: int, checkouts: Sequence[Checkout]) -> dict[str, list[str]]:
    """Name -> command line of everything that each commit does."""
    train = ["train", "configs/quickstart.yaml", *common_overrides(training_overrides(steps), checkouts)]
    generate = ["generate", RUN, "--domain", DOMAIN, "--prompt", PROMPT, "--json", "--logprobs", "3"]
    commands = {
        "train": train,
        "extract": ["extract", RUN, "--domain", DOMAIN, "--out", EXTRACTION],
        "generate": generate,
    }
    for name in FORMATS:
        if all(map(importlib.util.find_spec, EXPORT_FORMATS[name].packages)):
            commands[f"export-{name}"] = ["export", EXTRACTION, "--format", name, "--out", f"export-{name}"]
    return commands


def compare_runs(old: Checkout, new: Checkout) -> list[Comparison]:
    """Compare what `jobs` left in two checkouts' folders."""
    return [
        compare_metrics(old.folder / RUN / "metrics.jsonl", new.folder / RUN / "metrics.jsonl"),
        *compare_folders("checkpoint", old.folder / RUN / "checkpoints", new.folder / RUN / "checkpoints"),
        *compare_folders("extraction", old.folder / EXTRACTION, new.folder / EXTRACTION),
        *(
            comparison
            for name in FORMATS
            if (old.folder / f"export-{name}").exists()
            for comparison in compare_folders(name, old.folder / f"export-{name}", new.folder / f"export-{name}")
        ),
        compare_json("generated text", old.output("generate"), new.output("generate")),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train, extract and export with two commits; compare the results to the bit."
    )
    parser.add_argument("old", metavar="OLD", help="commit to compare with")
    parser.add_argument("new", metavar="NEW", nargs="?", help="commit to compare; the work tree if left out")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default 20)")
    parser.add_argument("--speed", action="store_true", help="measure training and decoding too")
    parser.add_argument("--rounds", type=int, default=9, help="with --speed: rounds (default 9)")
    parser.add_argument(
        "--work", type=Path, help="folder to work in and to keep, new or empty; a temporary one if left out"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.rounds < 1:
        parser.error("--steps and --rounds must be at least 1")
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
        if any(arguments.work.iterdir()):
            parser.error(f"--work {arguments.work} is not empty")
    workspace = tempfile.TemporaryDirectory(prefix="compare-commits-") if arguments.work is None else None
    with workspace or nullcontext(arguments.work) as folder:
        try:
            return _compare(arguments, Path(folder).resolve())
        except CommandFailed as error:
            print(error, file=sys.stderr)
            return 2


def _compare(arguments: argparse.Namespace, folder: Path) -> int:
    with progress("compare", 2, unit="commits") as job:
        checkouts = []
        for name, commit in (("old", arguments.old), ("new", arguments.new)):
            job.note = f"install {name}"
            checkouts.append(add_checkout(folder / name, commit))
            job.advance()
    old, new = checkouts
    print(f"OLD {old.title}\nNEW {new.title}\n", flush=True)
    if old.kernels != new.kernels:
        raise CommandFailed(f"compiled kernels were built for one of the commits only: {old.kernels}, {new.kernels}")
    commands = jobs(arguments.steps, checkouts)
    with progress("compare", len(commands) * 2, unit="commands") as job:
        for checkout in checkouts:
            with checkout.moved_to(folder / "current") as current:
                current.prepare_corpora(folder / "corpora")
                for name, words in commands.items():
                    current.run(name, words)
                    job.advance()
    comparisons = compare_runs(old, new)
    print(results_table(comparisons), flush=True)
    different = any(comparison.differences for comparison in comparisons)
    print(f"\n{'DIFFERENT' if different else 'EQUAL'}\n", flush=True)
    slower = False
    if arguments.speed:
        speeds = measure_speeds(checkouts, RUN, DOMAIN, arguments.rounds)
        print(speeds_table(speeds), flush=True)
        slower = not all(speed.passed for speed in speeds)
    return 1 if different or slower else 0


if __name__ == "__main__":
    sys.exit(main())
