"""The configuration over four real domains trains, where the corpora are."""

from pathlib import Path

import pytest

from pangu_sigma.monitor.metrics import read_metrics
from tests.pangu_sigma.train import process

ROOT = Path(__file__).parents[2]
CORPORA = ROOT.parent / "shared/data/corpora"


@pytest.mark.slow
@pytest.mark.skipif(not CORPORA.is_dir(), reason="no corpora of mathematics, drama and poetry here")
def test_four_real_domains_train(tmp_path):
    assert process.command("corpora", "--out", tmp_path, cwd=ROOT).returncode == 0
    own = [f"run.dir={tmp_path / 'run'}", f"domains.code.data=[{tmp_path / 'code.jsonl'}]"]
    short = ["train.steps=20", "schedule.warmup_steps=2", "evaluate.every=20", "evaluate.batches=1"]
    done = process.command("train", ROOT / "benchmarks/four_domains.yaml", *own, *short, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    first, last = [r["losses"] for r in read_metrics(tmp_path / "run") if r["kind"] == "evaluate"]
    assert set(last) == {"code", "math", "drama", "poetry"}
    assert all(last[name] < first[name] - 0.5 for name in last)
