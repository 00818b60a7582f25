"""The vocabulary's size before a tokenizer is trained or loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from pangu_sigma.config import load_config
from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size
from pangu_sigma.errors import UserError

QUICKSTART = Path(__file__).parents[4] / "configs" / "quickstart.yaml"


def quickstart(*overrides: str):
    return load_config(QUICKSTART, overrides)


def test_the_vocabulary_is_the_tokenizers_unless_it_is_written(tmp_path):
    assert vocabulary_size(quickstart()) == 4096
    assert vocabulary_size(quickstart("model.vocab_size=5000")) == 5000
    assert vocabulary_size(quickstart("data.tokenizer={kind: pangu_alpha, path: x}")) == 40000
    missing = quickstart("data.tokenizer={kind: sentencepiece, path: /no/such.model}")
    with pytest.raises(UserError, match=r"/no/such\.model does not exist"):
        vocabulary_size(missing)
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        vocabulary_size(quickstart(f"data.tokenizer={{kind: sentencepiece, path: {tmp_path}/broken.model}}"))


def test_a_given_tokenizer_is_asked_for_its_size(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join(f"the word number {i} of {i * i}" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=50, minloglevel=2
    )
    assert vocabulary_size(quickstart(f"data.tokenizer={{kind: sentencepiece, path: {tmp_path}/m.model}}")) == 50
