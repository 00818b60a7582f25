"""Importing PanGu-α: the same tensors, the same function, and a list of what does not fit."""

import json
import tracemalloc

import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.convert.import_pangu_alpha import PanguAlphaImportSettings, import_pangu_alpha
from pangu_sigma.errors import UserError
from pangu_sigma.trained_model import stored_config, stored_tokenizer
from tests.pangu_sigma.convert import pangu_alpha_files

HEADS = 2


@pytest.fixture(scope="session")
def tensors():
    return pangu_alpha_files.make_alpha(layers=3, hidden=16, ffn=32, vocab=384, positions=16)


@pytest.fixture
def import_settings(vocab_model):
    def make(**changes) -> PanguAlphaImportSettings:
        return PanguAlphaImportSettings(
            **{"tokenizer": vocab_model, "tokenizer_kind": "sentencepiece", "heads": HEADS, **changes}
        )

    return make


@pytest.fixture(scope="session")
def imported(tensors, vocab_model, tmp_path_factory):
    """The small model, from a merged file with moments and counters beside the weights."""
    folder = tmp_path_factory.mktemp("alpha")
    moments = {f"adam_{m}.{name}": array for m in "mv" for name, array in tensors.items()}
    counters = {"global_step": np.int32(7).reshape(()), "epoch_num": np.int32(1).reshape(())}
    source = pangu_alpha_files.write_ckpt(folder / "merged.ckpt", {**tensors, **moments, **counters})
    import_settings = PanguAlphaImportSettings(tokenizer=vocab_model, tokenizer_kind="sentencepiece", heads=HEADS)
    return import_pangu_alpha(source, folder / "out", import_settings)


def assert_same_tensors(folder, tensors) -> None:
    """Every tensor of PanGu-α, transposed where ours is, bit for bit; and no other."""
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    stored = checkpoint.load()
    assert len(stored) == len(tensors)
    for name, array in tensors.items():
        ours, transposed = pangu_alpha_files.ours(name)
        expected = np.ascontiguousarray(array.T if transposed else array).astype(np.float32)
        assert stored[ours].dtype == np.float32 and stored[ours].tobytes() == expected.tobytes(), name


def test_a_merged_file_comes_over_bit_for_bit(imported, tensors):
    assert_same_tensors(imported.checkpoint.path, tensors)


def test_the_model_computes_what_pangu_alpha_computes(imported, tensors, logits):
    tokens = np.random.default_rng(3).integers(20, 384, 16)
    expected = pangu_alpha_files.alpha_logits(tensors, HEADS, tokens)
    np.testing.assert_allclose(logits(imported.checkpoint.path, "general", tokens), expected, atol=2e-5)


def test_optimizer_state_and_counters_are_left_behind_by_name(imported, tensors):
    skipped = {name for names in imported.skipped.values() for name in names}
    moments = {f"adam_{m}.{name}" for m in "mv" for name in tensors}
    assert skipped == {*moments, "global_step", "epoch_num"}
    assert json.loads(imported.checkpoint.read_file("state.json"))["origin"]["skipped"] == imported.skipped


def test_the_configuration_says_everything(imported):
    model = stored_config(imported.checkpoint).model
    assert (model.layers, model.hidden, model.heads, model.ffn, model.positions) == (3, 16, HEADS, 32, 16)
    assert (model.vocab_size, model.activation, model.query_layer) == (384, "gelu", "next_position")
    assert model.sparse.layers == 0 and imported.eod_id == stored_tokenizer(imported.checkpoint).eod_id


@pytest.mark.parametrize("sharded", [True, False], ids=["optimizer sharded", "optimizer whole"])
def test_shards_of_a_parallel_run_come_over_bit_for_bit(tensors, import_settings, tmp_path, sharded):
    strategy = pangu_alpha_files.small_strategy(tensors, data=4, models=2, sharded=sharded)
    source = pangu_alpha_files.write_shards(tmp_path / "shards", tensors, strategy)
    assert_same_tensors(import_pangu_alpha(source, tmp_path / "out", import_settings()).checkpoint.path, tensors)


def test_float16_weights_are_widened_exactly(tensors, import_settings, tmp_path):
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    source = pangu_alpha_files.write_ckpt(tmp_path / "half.ckpt", half)
    assert_same_tensors(import_pangu_alpha(source, tmp_path / "out", import_settings()).checkpoint.path, half)


def test_later_names_of_the_embeddings_are_known(tensors, import_settings, tmp_path):
    deeper = {
        name.replace("backbone.word_", "backbone.embedding.word_").replace(
            "backbone.position_", "backbone.embedding.position_"
        ): array
        for name, array in tensors.items()
    }
    assert deeper.keys() != tensors.keys()
    source = pangu_alpha_files.write_ckpt(tmp_path / "deeper.ckpt", deeper)
    assert_same_tensors(import_pangu_alpha(source, tmp_path / "out", import_settings()).checkpoint.path, tensors)


# --- the published files


def published_import(published, tmp_path, strategy, layers, dtype=np.float32, **sizes):
    tensors = pangu_alpha_files.make_alpha(
        layers=layers, hidden=512, ffn=512, vocab=40000 // 100, positions=16, **sizes
    )
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    # The published vocabulary at a width of 512 would be most of the model: rows repeat.
    word = "backbone.word_embedding.embedding_table"
    tensors[word] = np.resize(tensors[word], (40000, 512))
    source = pangu_alpha_files.write_shards(tmp_path / "shards", tensors, strategy)
    import_settings = PanguAlphaImportSettings(tokenizer=published / "vocab.model", heads=8)
    return import_pangu_alpha(source, tmp_path / "out", import_settings), tensors


def test_512_shards_cut_by_the_published_strategy(published, tmp_path):
    strategy = pangu_alpha_files.cut_strategy(published / "pangu_alpha_13B_ckpt_strategy.ckpt", 3)
    done, tensors = published_import(published, tmp_path, strategy, 3)
    assert_same_tensors(done.checkpoint.path, tensors)
    tokenizer = stored_tokenizer(done.checkpoint)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod_id, tokenizer.pad_id) == ("pangu_alpha", 40000, 9, 6)
    assert tokenizer.encode("你好，今天天气不错。") == [5772, 10, 465, 235, 464, 1123, 12]
    assert stored_config(done.checkpoint).model.vocab_size == 40000 and done.transposed == 9


@pytest.mark.slow
@pytest.mark.parametrize(("size", "layers"), [("2.6B", 32), ("13B", 40)])
def test_the_whole_published_strategy(published, tmp_path, size, layers):
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    strategy = ParallelStrategyMap()
    strategy.ParseFromString((published / f"pangu_alpha_{size}_ckpt_strategy.ckpt").read_bytes())
    done, tensors = published_import(published, tmp_path, strategy, layers, np.float16)
    assert_same_tensors(done.checkpoint.path, tensors)


def test_another_end_of_document_id_can_be_chosen(tensors, published, import_settings, tmp_path):
    word = "backbone.word_embedding.embedding_table"
    large = {**tensors, word: np.resize(tensors[word], (40000, 16))}
    source = pangu_alpha_files.write_ckpt(tmp_path / "merged.ckpt", large)
    later = import_settings(tokenizer=published / "vocab.model", tokenizer_kind="pangu_alpha", eod_id=6)
    done = import_pangu_alpha(source, tmp_path / "out", later)
    assert done.eod_id == stored_tokenizer(done.checkpoint).eod_id == 6


def test_published_sizes_know_their_heads():
    from pangu_sigma.convert.import_pangu_alpha import _published_heads

    assert [_published_heads(32, 2560), _published_heads(40, 5120), _published_heads(64, 16384)] == [32, 40, 128]


@pytest.mark.parametrize("layout", ["merged", "shards"])
def test_memory_holds_one_tensor(import_settings, tmp_path, layout):
    tensors = pangu_alpha_files.make_alpha(layers=4, hidden=512, ffn=4096, vocab=384, positions=16)
    if layout == "merged":
        source = pangu_alpha_files.write_ckpt(tmp_path / "m.ckpt", tensors)
    else:
        source = pangu_alpha_files.write_shards(
            tmp_path / "s", tensors, pangu_alpha_files.small_strategy(tensors, data=4, models=2)
        )
    total = sum(array.nbytes for array in tensors.values())
    largest = max(array.nbytes for array in tensors.values())
    del tensors
    tracemalloc.start()
    import_pangu_alpha(source, tmp_path / "out", import_settings(heads=8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < largest + (16 << 20) < total // 3


# --- what does not fit


def refused(source, tmp_path, import_settings, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        import_pangu_alpha(source, tmp_path / "out", import_settings)
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_weight_that_is_no_number_is_named(tensors, import_settings, tmp_path, dtype):
    name = "backbone.blocks.1.attention.dense2.weight"
    wrong = {key: array.astype(dtype) for key, array in tensors.items()}
    wrong[name] = wrong[name].copy()
    wrong[name][3, 1] = np.inf
    source = pangu_alpha_files.write_ckpt(tmp_path / "wrong.ckpt", wrong)
    refused(source, tmp_path, import_settings(), name, "1 of", "one at [3, 1]")


def test_missing_foreign_and_misshapen_tensors_are_listed(tensors, import_settings, tmp_path):
    wrong = dict(tensors)
    del wrong["backbone.blocks.1.attention.dense2.bias"]
    wrong["backbone.blocks.1.attention.gate.weight"] = np.ones((2, 2), np.float32)
    wrong["backbone.blocks.0.output.mapping.bias"] = np.ones(31, np.float32)
    refused(
        pangu_alpha_files.write_ckpt(tmp_path / "m.ckpt", wrong), tmp_path, import_settings(), "lacks",
        "blocks.1.attention.key.bias", "backbone.blocks.1.attention.gate.weight",
        "backbone.blocks.0.output.mapping.bias [31] where [32] is needed",
    )  # fmt: skip


def test_a_missing_block_is_noticed(tensors, import_settings, tmp_path):
    without = {name: array for name, array in tensors.items() if ".blocks.0." not in name}
    refused(
        pangu_alpha_files.write_ckpt(tmp_path / "m.ckpt", without),
        tmp_path,
        import_settings(),
        "lacks",
        "blocks.0.attention",
    )


def test_missing_embeddings_name_the_published_files(tensors, import_settings, tmp_path):
    strategy = pangu_alpha_files.small_strategy(tensors, data=2, models=2)
    source = pangu_alpha_files.write_shards(tmp_path / "shards", tensors, strategy)
    (source / "word_embedding.npy").unlink()
    refused(source, tmp_path, import_settings(), "lacks embedding.word", "word_embedding.npy")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda folder: (folder / "filerted_3.ckpt").unlink(), ("shards 3 are missing",)),
        (lambda folder: (folder / "filerted_2.ckpt").rename(folder / "filerted_9.ckpt"), ("shards 2 are missing",)),
        (lambda folder: (folder / "pangu_alpha_ckpt_strategy.ckpt").unlink(), ("strategy file", "name it as strategy")),
        (lambda folder: (folder / "filerted_1.ckpt").write_bytes(b"PK"), ("filerted_1.ckpt", "no MindSpore")),
        (lambda folder: np.save(folder / "word_embedding.npy", np.array([{}])), ("word_embedding.npy",)),
        (lambda folder: np.save(folder / "word_embedding.npy", np.ones((3, 16))), ("float64",)),
        (lambda folder: (folder / "other_4.ckpt").write_bytes(b""), ("several sets",)),
    ],
)
def test_a_damaged_folder_of_shards_is_refused(tensors, import_settings, tmp_path, damage, parts):
    source = pangu_alpha_files.write_shards(
        tmp_path / "shards", tensors, pangu_alpha_files.small_strategy(tensors, data=2, models=2)
    )
    damage(source)
    refused(source, tmp_path, import_settings(), *parts)


def test_replicas_that_differ_are_refused(tensors, import_settings, tmp_path):
    source = pangu_alpha_files.write_shards(
        tmp_path / "shards", tensors, pangu_alpha_files.small_strategy(tensors, data=2, models=2)
    )
    shard = source / "filerted_3.ckpt"
    content, beta = shard.read_bytes(), tensors["backbone.layernorm.beta"]
    changed = beta.copy()
    changed[5] += 1
    assert beta.tobytes() in content
    shard.write_bytes(content.replace(beta.tobytes(), changed.tobytes()))
    refused(source, tmp_path, import_settings(), "filerted_0.ckpt and filerted_3.ckpt", "backbone.layernorm.beta")


def test_a_shard_with_other_tensors_is_refused(tensors, import_settings, tmp_path):
    source = pangu_alpha_files.write_shards(
        tmp_path / "shards", tensors, pangu_alpha_files.small_strategy(tensors, data=2, models=2)
    )
    with open(source / "filerted_2.ckpt", "ab") as file:
        file.write(pangu_alpha_files.ckpt_bytes("backbone.more", np.ones(2, np.float32)))
    refused(source, tmp_path, import_settings(), "filerted_2.ckpt holds other tensors", "backbone.more")


def test_embeddings_in_shards_and_files_must_be_the_same(tensors, import_settings, tmp_path):
    strategy = pangu_alpha_files.small_strategy(tensors, data=2, models=2)
    source = pangu_alpha_files.write_shards(tmp_path / "shards", tensors, strategy, npy=())
    np.save(source / "word_embedding.npy", tensors["backbone.word_embedding.embedding_table"])
    assert_same_tensors(import_pangu_alpha(source, tmp_path / "same", import_settings()).checkpoint.path, tensors)
    np.save(source / "word_embedding.npy", tensors["backbone.word_embedding.embedding_table"] + 1)
    refused(source, tmp_path, import_settings(), "word_embedding.embedding_table twice")


def test_unknown_heads_are_asked_for(tensors, import_settings, tmp_path):
    source = pangu_alpha_files.write_ckpt(tmp_path / "m.ckpt", tensors)
    refused(source, tmp_path, import_settings(heads=None), "give heads")
    refused(source, tmp_path, import_settings(heads=3), "does not divide")


def test_a_tokenizer_with_more_pieces_than_rows_is_refused(tensors, import_settings, tmp_path):
    word = "backbone.word_embedding.embedding_table"
    source = pangu_alpha_files.write_ckpt(tmp_path / "m.ckpt", {**tensors, word: tensors[word][:300]})
    refused(source, tmp_path, import_settings(), "384 pieces", "embeddings for 300")


def test_a_full_output_folder_is_refused_before_anything_is_read(import_settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        import_pangu_alpha(tmp_path / "none.ckpt", tmp_path / "out", import_settings())
