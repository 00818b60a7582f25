"""Hugging Face's tokenizer.json: what ends documents, and what stands for unknown characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pangu_sigma.config.data_section import TokenizerConfig
from pangu_sigma.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from pangu_sigma.data.tokenizers.tokenizer_registry import load_tokenizer
from pangu_sigma.data.tokenizers.tokenizer_training import build_tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.generation import document_begin, prompt_ids

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
CASES = Path(__file__).parents[5] / "shared" / "cases" / "tokenizer"
LETTERS = {letter: index for index, letter in enumerate("abcdefgh ")}


def written(path: Path, *special: str) -> Path:
    """A tokenizer.json of letters with these special pieces behind them."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(LETTERS), merges=[], unk_token=None))
    library.add_special_tokens(list(special))
    library.decoder = tokenizers.decoders.Fuse()
    library.save(str(path))
    return path


@pytest.mark.parametrize(
    "piece", ["</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|endoftext|>", "<eod>", "<eot>"]
)
def test_the_usual_ends_of_documents_are_recognised(tmp_path, piece):
    path = written(tmp_path / "tokenizer.json", "<s>", "<unk>", piece)
    tokenizer = build_tokenizer("huggingface", [], tmp_path, path)
    assert tokenizer.piece(tokenizer.eod_id) == piece and tokenizer.piece(tokenizer.unk_id) == "<unk>"
    assert tokenizer.decode([*tokenizer.encode("head"), tokenizer.eod_id]) == "head"


def test_another_one_is_named_by_piece_or_id_and_kept(tmp_path):
    path = written(tmp_path / "tokenizer.json", "<s>", "<|fin|>", "<pad>")
    with pytest.raises(UserError, match=r"data\.tokenizer\.eod.*its special pieces are <\|fin\|>$"):
        build_tokenizer("huggingface", [], tmp_path, path)
    by_piece = build_tokenizer("huggingface", [], tmp_path, path, eod="<|fin|>")
    by_id = build_tokenizer("huggingface", [], tmp_path, path, eod=by_piece.eod_id)
    assert by_piece.piece(by_piece.eod_id) == "<|fin|>" and by_id.fingerprint == by_piece.fingerprint
    by_piece.save(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").eod_id == by_piece.eod_id
    for wrong in ("<fin>", 99, -1):
        with pytest.raises(UserError, match=f"has no (piece|id) {wrong}: give the piece or the id"):
            build_tokenizer("huggingface", [], tmp_path, path, eod=wrong)


def test_a_file_without_special_pieces_says_so(tmp_path):
    with pytest.raises(UserError, match="it has no special pieces"):
        build_tokenizer("huggingface", [], tmp_path, written(tmp_path / "tokenizer.json"))
    assert HuggingFaceTokenizer((tmp_path / "tokenizer.json").read_bytes(), eod_id="a").unk_id is None


def test_the_configuration_takes_it_where_a_file_is_given():
    assert not list(TokenizerConfig(kind="huggingface", path="x", eod="</s>").violations())
    assert not list(TokenizerConfig(kind="sentencepiece", path="x", eod=3).violations())
    (sentence,) = TokenizerConfig(eod="</s>").violations()
    assert sentence.startswith("data.tokenizer.eod is set, but a trained tokenizer")


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
@pytest.mark.parametrize("name, piece", [("ends_with_slash_s", "</s>"), ("ends_with_end_of_text", "<|end_of_text|>")])
def test_files_as_they_are_found(tmp_path, name, piece):
    tokenizer = build_tokenizer("huggingface", [], tmp_path, CASES / f"{name}.json")
    assert tokenizer.piece(tokenizer.eod_id) == piece


def test_what_the_file_puts_in_front_of_a_text_begins_a_document():
    """A bos, as transformers writes it by the file's post-processor; and special pieces of a template's text."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["</s>", "<s>", "<|user|>", "<unk>", "the", "fox"]
    library = Library(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>", "<s>", "<|user|>"])
    plain = HuggingFaceTokenizer(library.to_str().encode(), eod_id=0)
    assert plain.begin_ids == () and document_begin(plain) == (0,)
    special = [("<s>", 1), ("</s>", 0)]
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer = HuggingFaceTokenizer(library.to_str().encode(), eod_id=0)
    theirs = PreTrainedTokenizerFast(tokenizer_object=library)
    assert prompt_ids(tokenizer, "the fox") == (0, 1, 4, 5) == (0, *theirs("the fox").input_ids[:-1])
    text = "<|user|> the fox </s>"
    assert tokenizer.encode_with_special(text) == [2, 4, 5, 0] == theirs(text, add_special_tokens=False).input_ids
    assert not {0, 1, 2} & set(tokenizer.encode(text))
    # Classes that make the post-processor themselves go by add_bos_token.
    cases = ("GPTNeoX", None, ()), ("GPTNeoX", True, (1,)), ("Llama", None, (1,)), ("Llama", False, ())
    for kind, said, bos in cases:
        settings = {"tokenizer_class": f"{kind}TokenizerFast", "bos_token": "<s>"}
        settings |= {} if said is None else {"add_bos_token": said}
        other = HuggingFaceTokenizer(library.to_str().encode(), eod_id=0)
        other.companions = {"tokenizer_config.json": json.dumps(settings).encode()}
        assert other.begin_ids == bos
    # A bos that is the end of documents stands there once.
    same = HuggingFaceTokenizer(library.to_str().encode(), eod_id=1)
    assert document_begin(same) == (1,)
