"""A larger vocabulary: what was there stays to the byte, what is new follows the rules."""

import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.convert.extend_vocabulary import extend_vocabulary
from pangu_sigma.convert.tokenizer_pieces import NORMAL, USER_DEFINED, stored_pieces, with_pieces
from pangu_sigma.convert.upcycle import upcycle
from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.trained_model import stored_config, stored_tokenizer
from tests.pangu_sigma.conftest import WORDS
from tests.pangu_sigma.convert.conftest import VOCAB, configuration, random_model

NEW = ["<python>", "silver moon", "arbitration", "  ", "Größe"]
GROUPS = {"code": 3, "law": 2}


@pytest.fixture(scope="session")
def sparse(vocab_model, corpora, pieces, tmp_path_factory):
    """A sparse model's folder, `uniform` tables, one embedding for each domain."""
    out = tmp_path_factory.mktemp("sparse") / "model"
    model = {"domain_parameters": {"embedding": "own"}, "sparse": {"layers": 2, "include_query_layer": True}}
    return random_model(out, configuration(out, vocab_model, corpora, model, GROUPS), pieces)


@pytest.fixture(scope="session")
def pieces_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("new") / "pieces.txt"
    path.write_text("\n".join(NEW) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def extended(sparse, pieces_file, tmp_path_factory):
    return extend_vocabulary(sparse, tmp_path_factory.mktemp("extended") / "out", pieces=pieces_file)


def test_old_ids_keep_their_pieces_and_new_ones_are_found(extended, sparse, pieces):
    new = stored_tokenizer(extended.checkpoint)
    assert new.vocab_size == VOCAB + len(NEW) and (new.eod_id, new.pad_id) == (pieces.eod_id, pieces.pad_id)
    assert [new.piece(i) for i in range(VOCAB)] == [pieces.piece(i) for i in range(VOCAB)]
    assert new.model.startswith(pieces.model)
    for index, piece in enumerate(NEW):
        assert VOCAB + index in new.encode(f"a {piece} b")
    text = "def <python> silver moon\n  x = 1 ▁ Größe"
    assert new.decode(new.encode(text)) == text
    plain = "def range print"
    assert new.encode(plain) == pieces.encode(plain)


def test_old_rows_and_everything_else_keep_their_bytes(extended, sparse):
    extended.checkpoint.verify()
    old, new = open_checkpoint(sparse).load(), extended.checkpoint.load()
    assert old.keys() == new.keys()
    grown = {name for name in old if name.endswith((".routing", "embedding.word"))}
    assert len(grown) == 6
    for name, array in old.items():
        if name in grown:
            assert len(new[name]) == VOCAB + len(NEW)
        assert new[name][: len(array)].tobytes() == array.tobytes() and new[name].dtype == array.dtype, name


def test_an_untied_head_gets_rows_too(vocab_model, corpora, pieces, pieces_file, tmp_path):
    config = configuration(tmp_path / "model", vocab_model, corpora, {"head": "untied", "init_cutoff": 1.0})
    old = open_checkpoint(random_model(tmp_path / "model", config, pieces)).load(["head.word", "embedding.word"])
    new = extend_vocabulary(tmp_path / "model", tmp_path / "out", pieces=pieces_file).checkpoint.load()
    for name, array in old.items():
        assert new[name][:VOCAB].tobytes() == array.tobytes()
        assert new[name].shape == (VOCAB + len(NEW), 16) and 0 < np.abs(new[name][VOCAB:]).max() <= np.float32(0.02)


def test_new_rows_are_drawn_as_a_new_models(extended, sparse, pieces_file, tmp_path):
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"<new{i}>" for i in range(2000)), encoding="utf-8")
    new = extend_vocabulary(sparse, tmp_path / "out", pieces=many).checkpoint.load()
    rows = [new[f"domains.{domain}.embedding.word"][VOCAB:] for domain in GROUPS]
    for drawn in rows:
        assert drawn.shape == (2000, 16) and abs(drawn.std() / 0.02 - 1) < 0.02 and abs(drawn.mean()) < 1e-3
    assert not np.array_equal(*rows)
    # a row does not depend on how many come after it
    first = extended.checkpoint.load(["domains.code.embedding.word"])["domains.code.embedding.word"]
    assert first[VOCAB:].tobytes() == rows[0][: len(NEW)].tobytes()


def test_new_rows_may_be_the_mean_of_the_old(sparse, pieces_file, tmp_path):
    done = extend_vocabulary(sparse, tmp_path / "out", pieces=pieces_file, initial="mean").checkpoint
    word = done.load(["domains.law.embedding.word"])["domains.law.embedding.word"]
    expected = word[:VOCAB].mean(0, dtype=np.float64)
    np.testing.assert_allclose(word[VOCAB:], np.tile(expected, (len(NEW), 1)), atol=1e-7)


def test_uniform_tables_stay_balanced_and_differ_between_layers(sparse, tmp_path):
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"<new{i}>" for i in range(100)), encoding="utf-8")
    new = extend_vocabulary(sparse, tmp_path / "out", pieces=many).checkpoint.load()
    for domain, size in GROUPS.items():
        tables = [new[f"domains.{domain}.{layer_name}.routing"] for layer_name in ("blocks.1", "query_layer")]
        for table in tables:
            ids = np.bincount(table, minlength=size)
            assert table.dtype == np.int32 and ids.sum() == VOCAB + 100 and ids.max() - ids.min() <= 1
        assert not np.array_equal(tables[0][VOCAB:], tables[1][VOCAB:])


@pytest.mark.parametrize("table", ["uniform", "frequency"])
def test_a_hash_layers_one_table_is_extended_by_its_rule(
    vocab_model, corpora, pieces, pieces_file, logits, tmp_path, table
):
    model = {"sparse": {"layers": 2, "router": "hash", "table": table, "include_query_layer": True}}
    folder = tmp_path / "model"
    random_model(folder, configuration(folder, vocab_model, corpora, model, GROUPS), pieces)
    words = [word for word in WORDS["law"].split() if word not in known(folder)]
    (tmp_path / "words.txt").write_text("\n".join(words), encoding="utf-8")
    done = extend_vocabulary(folder, tmp_path / "out", pieces=tmp_path / "words.txt").checkpoint
    old, new = open_checkpoint(folder).load(), done.load()
    tables = [new[f"{layer_name}.routing"] for layer_name in ("blocks.1", "query_layer")]
    assert not any(name.startswith("domains.") and name.endswith(".routing") for name in new)
    experts = sum(GROUPS.values())
    for layer_name, extended in zip(("blocks.1", "query_layer"), tables, strict=True):
        assert extended[:VOCAB].tobytes() == old[f"{layer_name}.routing"].tobytes() and len(extended) == VOCAB + len(
            words
        )
        if table == "uniform":
            ids = np.bincount(extended, minlength=experts)
            assert ids.max() - ids.min() <= 1
        else:
            from pangu_sigma.trained_model import load_trained

            counts = sum(store.token_counts for store in load_trained(done.path).corpus().stores)
            rows = np.bincount(extended[:VOCAB], counts[:VOCAB], minlength=experts)
            # By hand: new ids by falling count, each to the expert with the fewest rows; equal ones in any order.
            for count in sorted({*counts[VOCAB:]}, reverse=True):
                expected = []
                for _ in np.flatnonzero(counts[VOCAB:] == count):
                    expected.append(rows.argmin())
                    rows[expected[-1]] += count
                assert sorted(extended[VOCAB:][counts[VOCAB:] == count]) == sorted(expected)
    assert not np.array_equal(tables[0][VOCAB:], tables[1][VOCAB:])
    tokens = np.random.default_rng(0).integers(3, VOCAB, 16)
    before, after = logits(folder, "law", tokens), logits(done.path, "law", tokens)
    np.testing.assert_allclose(after[:, :VOCAB], before, atol=1e-6, rtol=0)


def test_frequency_tables_are_extended_by_the_new_tokens_counts(vocab_model, corpora, pieces, tmp_path):
    model = {"sparse": {"layers": 1, "table": "frequency"}}
    out = tmp_path / "model"
    config = configuration(out, vocab_model, corpora, model, GROUPS)
    random_model(out, config, pieces)
    words = [word for word in WORDS["law"].split() if word not in known(out)]
    (tmp_path / "words.txt").write_text("\n".join(words), encoding="utf-8")
    done = extend_vocabulary(out, tmp_path / "out", pieces=tmp_path / "words.txt").checkpoint
    table = done.load(["domains.law.blocks.1.routing"])["domains.law.blocks.1.routing"]
    from pangu_sigma.trained_model import load_trained

    (law,) = (s for s in load_trained(done.path).corpus().stores if s.name == "law")
    counts = law.token_counts
    assert len(words) > 3 and (counts[VOCAB:] > 50).all()
    before = np.bincount(table[:VOCAB], counts[:VOCAB], minlength=2)
    # by hand: new ids by falling count, each to the expert with the fewest rows
    for token in sorted(range(VOCAB, VOCAB + len(words)), key=lambda t: -counts[t]):
        if before[0] != before[1]:
            assert table[token] == before.argmin()
        before[table[token]] += counts[token]


def test_old_text_gets_the_same_logits(extended, sparse, logits):
    tokens = np.random.default_rng(0).integers(3, VOCAB, 16)
    for domain in GROUPS:
        old, new = logits(sparse, domain, tokens), logits(extended.checkpoint.path, domain, tokens)
        np.testing.assert_allclose(new[:, :VOCAB], old, atol=1e-6, rtol=0)
        assert new.shape == (16, VOCAB + len(NEW)) and np.isfinite(new).all()


def test_the_configuration_names_the_new_tokenizer(extended):
    config = stored_config(extended.checkpoint)
    assert config.model.vocab_size == VOCAB + len(NEW)
    assert config.data.tokenizer.kind == "sentencepiece"
    assert config.data.tokenizer.path == str(extended.checkpoint.path / "tokenizer/tokenizer.model")
    assert extended.checkpoint.fingerprints.tokenizer == stored_tokenizer(extended.checkpoint).fingerprint
    assert extended.checkpoint.step == 7 and extended.checkpoint.probe().keys() == set(GROUPS)


def test_rows_without_a_piece_are_taken_first_and_keep_their_bytes(vocab_model, corpora, pieces, pieces_file, tmp_path):
    out = tmp_path / "padded"
    random_model(out, configuration(out, vocab_model, corpora, {"vocab_size": VOCAB + 3}), pieces)
    done = extend_vocabulary(out, tmp_path / "out", pieces=pieces_file)
    assert (done.old_rows, done.rows, done.pieces) == (VOCAB + 3, VOCAB + 5, VOCAB + 5)
    old, new = open_checkpoint(out).load(["embedding.word"]), done.checkpoint.load(["embedding.word"])
    assert new["embedding.word"][: VOCAB + 3].tobytes() == old["embedding.word"].tobytes()


def test_a_tokenizer_that_was_extended_elsewhere_is_taken(sparse, pieces, tmp_path):
    elsewhere = with_pieces(pieces, ["<java>", "<go>"], USER_DEFINED)
    (tmp_path / "longer.model").write_bytes(elsewhere.model)
    done = extend_vocabulary(sparse, tmp_path / "out", tokenizer=tmp_path / "longer.model")
    assert stored_tokenizer(done.checkpoint).fingerprint == elsewhere.fingerprint and done.rows == VOCAB + 2


def test_a_run_with_optimizer_state_can_be_extended_and_extended_again(finished_run, pieces_file, tmp_path):
    first = extend_vocabulary(finished_run, tmp_path / "one", pieces=pieces_file)
    assert not any("optimizer" in name for name in first.checkpoint.manifest.tensors) and first.checkpoint.step == 12
    (tmp_path / "more.txt").write_text("<java>\n", encoding="utf-8")
    second = extend_vocabulary(tmp_path / "one", tmp_path / "two", pieces=tmp_path / "more.txt")
    assert second.rows == first.rows + 1


def test_an_upcycled_model_can_be_extended(dense, sparse_yaml, pieces_file, tmp_path, logits):
    upcycle(dense, sparse_yaml(), tmp_path / "up")
    done = extend_vocabulary(tmp_path / "up", tmp_path / "out", pieces=pieces_file)
    tokens = np.arange(VOCAB - 11, VOCAB + 5)  # new tokens too
    assert np.isfinite(logits(done.checkpoint.path, "law", tokens)).all()


# --- pieces


def test_the_library_agrees_on_ids_scores_and_types(pieces):
    """sentencepiece itself, read through its own interface, sees the appended model as we wrote it."""
    new = with_pieces(pieces, ["arbitration", "zzz"], USER_DEFINED)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=new.model)
    assert processor.get_piece_size() == VOCAB + 2
    for index, (piece, score, kind) in enumerate(stored_pieces(new.model)):
        assert processor.id_to_piece(index) == piece
        assert processor.get_score(index) == pytest.approx(score)
        assert processor.is_control(index) == (kind == 3) and processor.is_byte(index) == (kind == 6)


def test_a_normal_piece_must_be_what_merges_can_make(pieces):
    near = next(
        a + b
        for a in (pieces.piece(i) for i in range(300, VOCAB))
        for b in (pieces.piece(i) for i in range(300, VOCAB))
        if a.isalpha() and b.isalpha() and pieces.encode(a + b) == [*pieces.encode(a), *pieces.encode(b)]
        and len(pieces.encode(a + b)) == 2
    )  # fmt: skip
    assert with_pieces(pieces, [near], NORMAL).encode(near) == [VOCAB]
    with pytest.raises(UserError, match="would never make these pieces.*qxzjkw.*user-defined"):
        with_pieces(pieces, ["qxzjkw"], NORMAL)


def test_pangu_alphas_tokenizer_takes_words_and_refuses_what_jieba_splits(published):
    from pangu_sigma.data.tokenizers.pangu_alpha_tokenizer import PanguAlphaTokenizer

    old = PanguAlphaTokenizer((published / "vocab.model").read_bytes())
    new = with_pieces(old, ["transformer", "tokenization"], USER_DEFINED)
    assert 40001 in new.encode("the tokenization of a transformer") and new.eod_id == 9 and new.pad_id == 6
    assert new.encode("你好，今天天气不错。") == [5772, 10, 465, 235, 464, 1123, 12]
    with pytest.raises(UserError, match="would never make these pieces.*<python>"):
        with_pieces(old, ["<python>"], USER_DEFINED)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"abc\nabc\n", "names pieces twice: abc"), (b"\xff\xfe", "is not UTF-8")],
)
def test_a_file_of_pieces_is_checked(sparse, tmp_path, content, message):
    (tmp_path / "pieces.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        extend_vocabulary(sparse, tmp_path / "out", pieces=tmp_path / "pieces.txt")
    assert not (tmp_path / "out").exists()


def known(folder) -> set[str]:
    """The pieces of a model folder's tokenizer."""
    tokenizer = stored_tokenizer(open_checkpoint(folder))
    return {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}


def test_pieces_that_are_there_already_are_named_or_skipped(sparse, pieces, tmp_path):
    there = next(pieces.piece(i) for i in range(300, VOCAB) if pieces.piece(i).isalpha())
    (tmp_path / "pieces.txt").write_text(f"{there}\n<python>\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"has these pieces already: {there};"):
        extend_vocabulary(sparse, tmp_path / "out", pieces=tmp_path / "pieces.txt")
    done = extend_vocabulary(sparse, tmp_path / "out", pieces=tmp_path / "pieces.txt", skip_known=True)
    assert done.skipped == (there,) and done.rows == VOCAB + 1
    assert stored_tokenizer(done.checkpoint).piece(VOCAB) == "<python>"
    (tmp_path / "pieces.txt").write_text(f"{there}\n", encoding="utf-8")
    with pytest.raises(UserError, match="has every piece"):
        extend_vocabulary(sparse, tmp_path / "two", pieces=tmp_path / "pieces.txt", skip_known=True)


def test_a_tokenizer_that_is_no_extension_is_refused(sparse, published, vocab_model, pieces, tmp_path):
    with pytest.raises(UserError, match="is no extension of the model's: id"):
        extend_vocabulary(sparse, tmp_path / "out", tokenizer=published / "vocab.model")
    with pytest.raises(UserError, match="must have more"):
        extend_vocabulary(sparse, tmp_path / "out", tokenizer=vocab_model)
    with pytest.raises(UserError, match="no SentencePiece model"):
        (tmp_path / "x.model").write_bytes(b"hello")
        extend_vocabulary(sparse, tmp_path / "out", tokenizer=tmp_path / "x.model")
    assert isinstance(pieces, SentencePieceTokenizer)


def test_one_source_of_pieces_is_needed(sparse, pieces_file, vocab_model, tmp_path):
    for options in ({}, {"pieces": pieces_file, "tokenizer": vocab_model}):
        with pytest.raises(UserError, match="give one of the two"):
            extend_vocabulary(sparse, tmp_path / "out", **options)
