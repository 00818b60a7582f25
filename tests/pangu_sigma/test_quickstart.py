"""The quickstart's end: figures, samples, and one domain cut out and shown to be the same function."""

from pangu_sigma.checkpoint import open_checkpoint
from tests.pangu_sigma.training.training_process import checkpoint, command


def test_it_ends_with_a_domain_that_was_cut_out_verified_and_writes(copied_run, small_yaml, tmp_path):
    run = copied_run(12)  # at its last step: nothing is left to train
    words = ("quickstart", small_yaml, f"run.dir={run}", "data.cache=null", "evaluate.batches=1")
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    line = next(index for index, text in enumerate(lines) if text.startswith("Largest logit difference"))
    assert "difference 0.0 over 2 probe sequences in batches that mix 3 domains" in lines[line]
    assert lines[line - 1].startswith(f"{run.relative_to(tmp_path)}/extracted/code: code, ")
    assert "--- code: the same beginning ▸ and what the sub-model writes on" in lines[line + 1 :]
    model = open_checkpoint(run / "extracted" / "code")
    model.verify()
    parent = open_checkpoint(checkpoint(run, 12))
    assert model.state["origin"]["parent"]["sha256"] == parent.sha256
