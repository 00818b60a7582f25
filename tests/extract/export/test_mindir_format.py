"""The exported graphs compute what the model computes, and their files what the graphs compute, to the bit."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.train.mind_ir_pb2 import ModelProto

from extract.export.export_formats import Options
from extract.export.export_job import export
from extract.export.export_source import open_source
from extract.export.mindir_format import GRAPHS, shapes_of, side_by_side
from extract.export.mindir_graphs import STATE, build_graph, fill
from pangu_sigma.errors import UserError
from pangu_sigma.model.position_ids import positions_and_segments
from pangu_sigma.trained_model import load_trained
from tests.extract.export.conftest import LENGTH, domains_of, some_tokens
from tests.oracles.recomputing_decoder import RecomputingDecoder

TOLERANCE = 1e-5
BATCH = 2


@pytest.fixture(scope="module")
def exported(stored, tmp_path_factory):
    """(case, options of the export) -> (what it was made from, folder, graphs loaded from the files by name)."""
    made = {}

    def get(case: str, domains: tuple[str, ...] = (), **options):
        key = (case, domains, *options.items())
        if key not in made:
            source, out = stored(case), tmp_path_factory.mktemp("mindir") / "out"
            export(source.path, out, "mindir", domains, Options(batch_size=BATCH, **options))
            graphs = {name: nn.GraphCell(ms.load(str(out / f"{name}.mindir"))) for name in ("prefill", "decode")}
            made[key] = source, out, graphs
        return made[key]

    return get


def call(graph, *inputs: np.ndarray) -> list[np.ndarray]:
    return [output.asnumpy() for output in as_tuple(graph(*map(Tensor, inputs)))]


def as_tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def hand_over(prefill, decode) -> None:
    """Give the decoding graph the caches that the window has filled, as its description tells."""
    filled = {parameter.name: parameter for parameter in prefill.get_parameters()}
    for parameter in decode.get_parameters():
        if parameter.name in STATE:
            parameter.set_data(filled[parameter.name])


def numbers(source, domains: list[str]) -> np.ndarray:
    return np.array([source.groups.names.index(domain) for domain in domains], np.int32)


@pytest.mark.parametrize("case", ["dense", "sub_model", "full_model", "switch"])
def test_a_window_and_single_tokens_after_it_give_the_models_logits(exported, case):
    source, _, graphs = exported(case)
    tokens, domains = some_tokens(source, BATCH, LENGTH), domains_of(source, BATCH)
    expected = source.logits(tokens, domains)
    known = np.array([5, 13], np.int32)
    given = (numbers(source, domains),) if len(source.groups.names) > 1 else ()
    prompt = np.where(np.arange(LENGTH) < known[:, None], tokens, source.tokenizer.pad_id).astype(np.int32)
    logits, *state = call(graphs["prefill"], prompt, known, *given)
    for b, n in enumerate(known):
        np.testing.assert_allclose(logits[b, :n], expected[b, :n], rtol=TOLERANCE, atol=TOLERANCE)
    for offset in range(LENGTH - known.max()):
        index = known + offset
        logits, *state = call(graphs["decode"], tokens[np.arange(BATCH), index][:, None], index, *state, *given)
        np.testing.assert_allclose(
            logits[:, 0], expected[np.arange(BATCH), index], rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(offset)
        )


def test_a_loaded_graph_is_the_exported_one_bit_for_bit(exported):
    for case, options in [("full_model", {}), ("sub_model", {"signature": "sigma"})]:
        source, _, loaded = exported(case, **options)
        opened = open_source(source.path)
        options = Options(batch_size=BATCH, **options)
        draw = np.random.default_rng(0)
        for name in GRAPHS:
            graph = build_graph(shapes_of(opened, options), options.signature, name)
            fill(graph.cell, side_by_side(opened, options))
            inputs = [
                Tensor(draw.integers(0, 2, t.shape).astype(np.int32) if t.dtype == ms.int32 else
                       draw.standard_normal(t.shape).astype(np.float32))
                for t in graph.inputs.values()
            ]  # fmt: skip
            state = {p.name: p for p in loaded[name].get_parameters() if p.name in graph.state}
            assert state.keys() == set(graph.state)
            for call_number in range(2 if state else 1):  # the second call reads what the first has written
                ours, theirs = graph.cell(*inputs), loaded[name](*inputs)
                for one, other in zip(as_tuple(ours), as_tuple(theirs), strict=True):
                    assert one.asnumpy().tobytes() == other.asnumpy().tobytes(), (case, name, call_number)
            for parameter in graph.cell.get_parameters():
                if parameter.name in state:
                    written = parameter.asnumpy()
                    assert written.any() and written.tobytes() == state[parameter.name].asnumpy().tobytes()


def test_the_window_agrees_with_the_model_itself(exported):
    source, _, graphs = exported("sub_model")
    decoder = RecomputingDecoder(load_trained(source.path).model)
    tokens = some_tokens(source, BATCH, LENGTH)
    logits = call(graphs["prefill"], tokens, np.full(BATCH, LENGTH, np.int32))[0]
    for b in range(BATCH):
        np.testing.assert_allclose(logits[b], decoder.score(tokens[b], 0), rtol=TOLERANCE, atol=TOLERANCE)


def outside(source, out, tokens: np.ndarray, domains: list[str]):
    """What a host makes of tokens [B, S] for the deployed signature: expert ids, mask, positions."""
    positions, segments = positions_and_segments(tokens, source.tokenizer.eod_id)
    mask = np.tril(segments[:, :, None] == segments[:, None, :]).astype(np.float32)
    ids = ()
    if source.config.model.sparse_prefixes:
        table = np.load(out / "expert_ids.npy")
        ids = (np.ascontiguousarray(table[:, numbers(source, domains)[:, None], tokens]),)
    return ids, mask, positions


@pytest.mark.parametrize("case", ["dense", "sub_model", "no_query_layer"])
def test_the_deployed_signature_gives_the_models_logits(exported, case):
    source, out, graphs = exported(case, signature="sigma")
    tokens, domains = some_tokens(source, BATCH, LENGTH), domains_of(source, BATCH)
    expected = source.logits(tokens, domains)
    ids, mask, positions = outside(source, out, tokens, domains)
    rows = np.arange(BATCH)
    for known in (np.array([5, 13], np.int32), np.array([9, 2], np.int32)):  # a second text finds nothing of the first
        (logits,) = call(graphs["prefill"], tokens, *ids, mask, positions, known - 1, known)
        np.testing.assert_allclose(logits, expected[rows, known - 1], rtol=TOLERANCE, atol=TOLERANCE)
        hand_over(graphs["prefill"], graphs["decode"])
        for offset in range(LENGTH - known.max()):
            positions_now = known + offset
            one = tuple(np.ascontiguousarray(i[:, rows, positions_now][..., None]) for i in ids)
            (logits,) = call(
                graphs["decode"], tokens[rows, positions_now][:, None], *one, mask[rows, positions_now][:, None],
                positions[rows, positions_now][:, None], positions_now, positions_now + 1,
            )  # fmt: skip
            np.testing.assert_allclose(
                logits, expected[rows, positions_now], rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(offset)
            )


def test_inputs_are_named_and_ordered_as_deployed(exported):
    names = {}
    for case in ("dense", "sub_model"):
        _, out, _ = exported(case, signature="sigma")
        for graph in GRAPHS:
            file = ModelProto()
            file.ParseFromString((out / f"{graph}.mindir").read_bytes())
            input_names = [
                each.name.rpartition(":")[2] for each in file.graph.input
            ]  # the graph's name stands before it
            said = json.loads((out / "graphs.json").read_text())["graphs"][f"{graph}.mindir"]
            assert list(said["inputs"]) == input_names and list(said["state"]) == list(STATE)
            assert names.setdefault(case, input_names) == input_names  # the same for a window and for one token
    six = ["input_ids", "expert_ids", "attention_mask", "position_ids", "current_index", "batch_valid_length"]
    assert names == {"sub_model": six, "dense": [name for name in six if name != "expert_ids"]}
    described = json.loads((exported("sub_model", signature="sigma")[1] / "graphs.json").read_text())
    assert described["graphs"]["prefill.mindir"]["inputs"]["expert_ids"] == {"shape": [2, 2, 24], "type": "int32"}
    assert described["meanings"].keys() == {*six, *STATE, "logits"}


def test_with_a_capacity_overflow_takes_the_residual_alone(exported, stored):
    """As many rows of a sample as capacity_factor * window / experts, in token order, and the others get zero."""
    source, out, graphs = exported("no_query_layer", signature="sigma", capacity_factor=1.0)
    capacity = json.loads((out / "graphs.json").read_text())["capacity"]
    assert capacity == -(-LENGTH // 5)
    tokens, domains = some_tokens(source, BATCH, LENGTH), domains_of(source, BATCH)
    ids, mask, positions = outside(source, out, tokens, domains)
    everything = np.full(BATCH, LENGTH, np.int32)
    kept = call(graphs["prefill"], tokens, *ids, mask, positions, everything - 1, everything)[0]
    # An id outside the layer has no expert, which is what overflow is.
    dropped = ids[0].copy()
    for layer in dropped:
        for row in layer:
            taken: dict[int, int] = {}
            for s, expert in enumerate(row):
                taken[expert] = taken.get(expert, 0) + 1
                row[s] = expert if taken[expert] <= capacity else 99
    assert (dropped == 99).any()
    prefill = exported("no_query_layer", signature="sigma")[2]["prefill"]
    expected = call(prefill, tokens, dropped, mask, positions, everything - 1, everything)[0]
    np.testing.assert_allclose(kept, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_chosen_domain_goes_alone_and_is_written_with_its_tokenizer(exported, stored):
    source, out, graphs = exported("full_model", ("poems",))
    tokens = some_tokens(source, BATCH, LENGTH)
    logits = call(graphs["prefill"], tokens, np.full(BATCH, LENGTH, np.int32))[0]
    expected = source.logits(tokens, ["poems"] * BATCH)
    np.testing.assert_allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert json.loads((out / "graphs.json").read_text())["domains"] == ["poems"]
    assert (out / "tokenizer" / "tokenizer.model").read_bytes() == source.tokenizer.model


def test_what_cannot_be_is_refused_with_the_reason(stored, tmp_path):
    for case, options, reason in [
        ("switch", Options(signature="sigma"), "a learned gate makes them inside"),
        ("full_model", Options(signature="sigma"), "choose one domain"),
        ("dense", Options(dtype="float16"), "float32"),
        ("dense", Options(signature="other"), "choose plain, sigma"),
        ("sub_model", Options(capacity_factor=1.1), "belongs to the signature sigma"),
        ("dense", Options(max_shard_bytes=9), "max_shard_size means nothing to the format mindir"),
    ]:
        with pytest.raises(UserError, match=reason):
            export(stored(case).path, tmp_path / "out", "mindir", options=options)
    assert not list(tmp_path.iterdir())
