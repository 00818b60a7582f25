"""The commands as a user types them: what they print, and one sentence for a mistake."""

import numpy as np

from pangu_sigma.checkpoint import open_checkpoint
from tests.pangu_sigma.convert import pangu_alpha_files
from tests.pangu_sigma.training.training_process import assert_refused, command


def test_import_says_what_it_took_and_what_it_left_behind(vocab_model, tmp_path):
    tensors = pangu_alpha_files.make_alpha(layers=3, hidden=16, ffn=32, vocab=384, positions=16)
    moments = {f"adam_m.{name}": array for name, array in tensors.items()}
    step = {"global_step": np.int32(3).reshape(())}
    pangu_alpha_files.write_ckpt(tmp_path / "merged.ckpt", {**tensors, **moments, **step})
    options = ["--tokenizer", vocab_model, "--tokenizer-kind", "sentencepiece", "--heads", "2", "--out", "out"]
    done = command("import", "pangu-alpha", "merged.ckpt", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 layers (query layer included), hidden 16, heads 2, ffn 32, vocabulary 384, positions 16" in done.stdout
    assert f"left behind {len(tensors)} tensors: adam_m.*" in done.stdout
    assert "left behind 1 tensors: counters" in done.stdout
    assert len(open_checkpoint(tmp_path / "out").manifest.tensors) == len(tensors)
    assert_refused(command("import", "pangu-alpha", "merged.ckpt", *options, cwd=tmp_path), "out exists")


def test_upcycle_and_extend_in_a_row(dense, sparse_yaml, tmp_path):
    done = command("upcycle", dense, "--config", sparse_yaml(), "--out", "up", cwd=tmp_path)
    assert done.returncode == 0 and "in 2 sparse layers of 5 experts for 2 domains" in done.stdout, done.stderr
    (tmp_path / "pieces.txt").write_text("<python>\n<java>\n", encoding="utf-8")
    done = command("vocab", "extend", "up", "--pieces", "pieces.txt", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and "384 pieces became 386, 384 embedding rows 386" in done.stdout, done.stderr


def test_mistakes_end_in_one_sentence(dense, sparse_yaml, tmp_path):
    wrong = command("upcycle", dense, "--config", sparse_yaml(), "--out", "up", "model.ffn=48", cwd=tmp_path)
    assert_refused(wrong, "model.ffn is 48 and the dense model's 32")
    assert_refused(command("vocab", "extend", dense, "--out", "x", cwd=tmp_path), "--pieces", "--tokenizer")
    assert_refused(command("vocab", "extend", dense, "--pieces", "no.txt", "--out", "x", cwd=tmp_path), "no.txt")
