"""benchmarks/four_domains.yaml trains on the real corpora, where they are."""

from pathlib import Path

import pytest

from pangu_sigma.config import load_config
from pangu_sigma.data.builtin_corpora import build

ROOT = Path(__file__).parents[2]
CORPORA = ROOT.parent / "shared" / "data" / "corpora"


@pytest.mark.slow
@pytest.mark.skipif(not CORPORA.is_dir(), reason="the corpora are not beside the repository")
def test_four_domains_trains(tmp_path):
    from pangu_sigma.training.job import open_run

    build(tmp_path / "corpora")
    overrides = [f"domains.code.data=[{tmp_path}/corpora/code.jsonl]", f"run.dir={tmp_path}/run"]
    overrides += [f"domains.{n}.data=[{CORPORA}/{n}.jsonl]" for n in ("math_en", "drama_en", "poetry_zh")]
    overrides += ["train.stop_at=20", "evaluate.every=20"]
    config = load_config(ROOT / "benchmarks" / "four_domains.yaml", overrides)
    with open_run(config, resume=False) as run:
        start = run.evaluation.evaluator.losses(run.evaluation.sequences, 2)[0]
        run.train()
        after = run.evaluation.evaluator.losses(run.evaluation.sequences, 2)[0]
    assert all(after[name] < start[name] - 0.5 for name in start)
