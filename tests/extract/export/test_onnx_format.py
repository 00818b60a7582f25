"""onnxruntime computes the model's logits: whole texts, pieces with caches, padding, every kind of model."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from extract.export.export_formats import Options
from extract.export.export_job import export
from pangu_sigma.errors import UserError
from tests.extract.export.conftest import CASES, LENGTH, domains_of, some_tokens

TOLERANCE = 1e-4


class Runner:
    """Runs an exported file, going on from its own caches."""

    def __init__(self, folder, config) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each.shape for each in self.session.get_inputs()}
        self.domains = json.loads(self.session.get_modelmeta().custom_metadata_map["domains"])
        self.config = config

    def start(self, batch: int) -> dict[str, np.ndarray]:
        state = {"past_documents": np.zeros((batch, 0), np.int64), "next_document": np.ones(batch, np.int64)}
        for name, shape in self.inputs.items():
            if name.startswith("past_key_values"):
                state[name] = np.zeros((batch, shape[1], 0, shape[3]), np.float32)
        return state

    def __call__(self, tokens, domains, state=None, real=None):
        """Logits of `tokens` after `state`, and the state after them; `real` [B, total] marks what is no padding."""
        state = state or self.start(len(tokens))
        total = state["past_documents"].shape[1] + tokens.shape[1]
        feed = {"input_ids": tokens.astype(np.int64), **state}
        feed["attention_mask"] = np.ones((len(tokens), total), np.int64) if real is None else real.astype(np.int64)
        if "domain" in self.inputs:
            feed["domain"] = np.array([self.domains.index(domain) for domain in domains])
        names = [each.name for each in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        logits = outputs.pop("logits")
        renamed = {"documents": "past_documents", "following_document": "next_document"}
        return logits, {renamed.get(n, n.replace("present", "past_key_values")): a for n, a in outputs.items()}


@pytest.fixture(scope="module")
def exported(stored, tmp_path_factory):
    """Case name -> (what it was made from, folder, runner)."""
    made = {}

    def get(case: str):
        if case not in made:
            source, out = stored(case), tmp_path_factory.mktemp("onnx") / "out"
            export(source.path, out, "onnx")
            made[case] = source, out, Runner(out, source.config)
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_in_one_go_and_in_pieces(exported, case):
    source, out, run = exported(case)
    onnx.checker.check_model(out / "model.onnx", full_check=True)
    tokens, domains = some_tokens(source, 3, LENGTH), domains_of(source, 3)
    expected = source.logits(tokens, domains)
    np.testing.assert_allclose(run(tokens, domains)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    state, parts = None, []
    for start, end in [(0, 7), (7, 8), (8, 17), *((i, i + 1) for i in range(17, LENGTH))]:
        logits, state = run(tokens[:, start:end], domains, state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["full_model", "switch"])
def test_padding_on_the_left_changes_no_logits_and_is_gone_on_from(exported, case):
    source, _, run = exported(case)
    rows, domains = [some_tokens(source, 1, n, seed=n)[0] for n in (LENGTH - 6, 5)], domains_of(source, 2)
    longest = len(rows[0])
    tokens, real = np.full((2, longest), source.tokenizer.pad_id), np.zeros((2, longest), int)
    for b, row in enumerate(rows):
        tokens[b, longest - len(row) :], real[b, longest - len(row) :] = row, 1
    logits, state = run(tokens, domains, real=real)
    more = np.array([[5], [9]])
    after, _ = run(more, domains, state, np.concatenate([real, np.ones((2, 1), int)], 1))
    for b, row in enumerate(rows):
        expected = source.logits(np.array([[*row, more[b, 0]]]), domains[b : b + 1])[0]
        np.testing.assert_allclose(logits[b, longest - len(row) :], expected[:-1], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(after[b, 0], expected[-1], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_chosen_domain_goes_alone_and_is_written_with_its_tokenizer(stored, tmp_path):
    source = stored("full_model")
    export(source.path, tmp_path / "poems", "onnx", ["poems"])
    run = Runner(tmp_path / "poems", source.config)
    assert run.domains == ["poems"] and "domain" not in run.inputs
    tokens = some_tokens(source, 2, LENGTH)
    expected = source.logits(tokens, ["poems"] * 2)
    np.testing.assert_allclose(run(tokens, None)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    names = {each.name for each in onnx.load(tmp_path / "poems" / "model.onnx").graph.initializer}
    assert not any("code" in name for name in names)
    assert (tmp_path / "poems" / "tokenizer" / "tokenizer.model").read_bytes() == source.tokenizer.model


def test_a_gate_ignores_the_domain_that_it_is_given(exported):
    """The input is there for every model of several domains, so that a program need not ask for the router."""
    source, _, run = exported("switch")
    assert "domain" in run.inputs
    tokens = some_tokens(source, 2, LENGTH)
    assert (run(tokens, ["code", "code"])[0] == run(tokens, ["poems", "code"])[0]).all()


def test_weights_lie_beside_the_graph(exported):
    source, out, _ = exported("full_model")
    numbers = sum(tensor.size for tensor in source.tensors.values())
    assert (out / "model.onnx.data").stat().st_size >= 4 * numbers
    for each in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer:
        assert each.data_location == onnx.TensorProto.EXTERNAL or len(each.raw_data) < 64


def test_other_element_types_are_refused(stored, tmp_path):
    with pytest.raises(UserError, match="written in float32"):
        export(stored("dense").path, tmp_path / "out", "onnx", options=Options(dtype="float16"))
