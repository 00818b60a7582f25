"""Examples as files: what a line must be, the template, the window, what is held out."""

import io
import json

import numpy as np
import pytest
import sentencepiece

from pangu_sigma.config.finetuning_section import AdaptConfig
from pangu_sigma.data.chat_template import as_text
from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.finetuning.examples import load_examples, prompt_and_answers
from tests.pangu_sigma.finetuning.conftest import answers, pairs, write_jsonl

WINDOW = 64


@pytest.fixture(scope="module")
def tokenizer(taught):
    (step,) = (taught / "checkpoints").iterdir()
    return SentencePieceTokenizer((step / "tokenizer" / "tokenizer.model").read_bytes())


def finetuning_config(objective="sft", **changes) -> AdaptConfig:
    return AdaptConfig(objective=objective, examples=[{"name": "law", "data": ["x"]}], **changes)


def load(path, tokenizer, adapt=None, window=WINDOW):
    return load_examples("law", [str(path)], adapt or finetuning_config(), tokenizer, window)


def test_a_prompt_is_tokenised_as_the_server_gives_it_to_the_model(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "the court", "answer": "shall"}])
    ((example,),) = load(path, tokenizer).train
    prompt_ids = tokenizer.encode(as_text([("user", "the court")]))
    assert example.ids[: example.prompt].tolist() == prompt_ids
    assert tokenizer.decode(example.ids) == "User: the court\nAssistant: shall" and example.ids[-1] == tokenizer.eod_id


def test_plain_text_is_left_as_it_is():
    assert prompt_and_answers("plain", "2 + 2 =", [" 4"]) == ("2 + 2 =", (" 4",))


def test_too_long_examples_are_cut_or_left_out_and_counted(tmp_path, tokenizer):
    long = "court " * WINDOW
    records = [*answers("law", 5), {"prompt": "shall", "answer": long}, {"prompt": long, "answer": "judge"}]
    examples = load(write_jsonl(tmp_path / "long.jsonl", records), tokenizer, finetuning_config(heldout_fraction=0.0))
    assert examples.truncated == 1 and examples.dropped == 1 and len(examples.train) == 6
    assert len(examples.train[5][0].ids) == WINDOW + 1
    sentence = "law: 6 examples to learn from, 0 held out, 1 answers cut at the window's end, 1 left out because"
    assert examples.sentence().startswith(sentence)
    with pytest.raises(UserError, match="no prompt leaves room for an answer in 4 tokens; shorten them"):
        load(write_jsonl(tmp_path / "short.jsonl", answers("law", 2)), tokenizer, window=4)


def test_what_is_held_out_depends_on_the_text_alone_and_never_is_all(tmp_path, tokenizer):
    records = answers("law", 30)
    one = load(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, finetuning_config(heldout_fraction=0.3))
    other = load(
        write_jsonl(tmp_path / "b.jsonl", reversed(records)), tokenizer, finetuning_config(heldout_fraction=0.3)
    )

    def texts(part):
        return {tuple(example[0].ids.tolist()) for example in part}

    assert texts(one.heldout) == texts(other.heldout) and not texts(one.heldout) & texts(one.train)
    for fraction in (0.001, 0.999):
        few = load(
            write_jsonl(tmp_path / "c.jsonl", records[:3]), tokenizer, finetuning_config(heldout_fraction=fraction)
        )
        assert few.train and few.heldout
    assert one.fingerprint != other.fingerprint


def test_a_pair_has_one_prompt_and_two_answers(tmp_path, tokenizer):
    examples = load(write_jsonl(tmp_path / "pairs.jsonl", pairs("law", 8)), tokenizer, finetuning_config("dpo"))
    for chosen, rejected in (*examples.train, *examples.heldout):
        np.testing.assert_array_equal(chosen.ids[: chosen.prompt], rejected.ids[: rejected.prompt])


GOOD = json.dumps({"prompt": "a", "answer": "b"}) + "\n"


@pytest.mark.parametrize(
    "text, said",
    [
        (GOOD + "{'prompt'\n", r":2: the line is not valid JSON \(Expecting property name"),
        (GOOD + "[1]\n", r":2: the line is no JSON object"),
        (GOOD + '{"prompt": "a"}\n', r":2: the field 'answer' is missing"),
        (GOOD + '{"prompt": 3, "answer": "b"}\n', r":2: the field 'prompt' is no string"),
        (GOOD + '{"prompt": "a", "answer": " "}\n', r":2: the field 'answer' is empty"),
        (GOOD + '{"prompt": "a", "answer": "\\ud800"}\n', r":2: the field 'answer' holds half a surrogate pair"),
        ("", r"bad.jsonl is empty; give one example a line"),
    ],
    ids=["no json", "no object", "missing", "no string", "empty", "surrogate", "empty file"],
)
def test_a_line_that_is_no_example_is_named(tmp_path, tokenizer, text, said):
    (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "bad.jsonl", tokenizer)


def test_files_that_are_no_jsonl_are_named(tmp_path, tokenizer):
    (tmp_path / "bad.txt").write_text("a")
    with pytest.raises(UserError, match="bad.txt is no .jsonl file; write one JSON object a line"):
        load(tmp_path / "bad.txt", tokenizer)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match="latin.jsonl is not UTF-8"):
        load(tmp_path / "latin.jsonl", tokenizer)


def test_blank_lines_are_passed_over(tmp_path, tokenizer):
    (tmp_path / "plain.jsonl").write_text(GOOD * 2)
    (tmp_path / "blank.jsonl").write_text("\n" + GOOD + " \n" + GOOD + "\n\n")
    plain, blank = (load(tmp_path / f"{name}.jsonl", tokenizer) for name in ("plain", "blank"))
    assert len(blank.train) == len(plain.train)


def test_the_border_has_the_tokens_of_the_joined_text(tmp_path):
    """Tokens that a dummy prefix or a merge across the border would change are those of prompt and answer together."""
    lines = [f"import os{i} and sys. The function returns {i}" for i in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=120, model_type="bpe", minloglevel=2
    )
    prefixed = SentencePieceTokenizer(model.getvalue())  # with SentencePiece's dummy prefix, its default
    records = [{"prompt": "import o", "answer": "s"}, {"prompt": "The func", "answer": "tion returns"}]
    examples = load(write_jsonl(tmp_path / "border.jsonl", records), prefixed, finetuning_config(template="plain"))
    for example, record in zip((*examples.train, *examples.heldout), records, strict=True):
        (sequence,) = example
        together = record["prompt"] + record["answer"]
        assert prefixed.decode(sequence.ids.tolist()) == together
        assert sequence.ids.tolist() == [*prefixed.encode(together), prefixed.eod_id]
        assert 1 <= sequence.prompt <= len(prefixed.encode(record["prompt"]))
        learned = prefixed.decode(sequence.ids[sequence.prompt :].tolist())
        assert learned.endswith(record["answer"]) and not learned.startswith(" ")
