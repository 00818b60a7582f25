"""The sub-model is the same function, to the bit; and the check that says so can fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from extract import verify_sub_model
from extract.extraction_job import extract, plan
from extract.extraction_plan import ExtractionPlan
from extract.verify_sub_model import VerificationError, compare_tensors, mixed_batches, verify
from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.errors import UserError
from tests.extract.conftest import flip_byte, save_model


@pytest.fixture(scope="module")
def poems(parent, tmp_path_factory):
    """The domain `poems` cut out of the parent, verified."""
    out = tmp_path_factory.mktemp("out") / "poems"
    return extract(plan(parent, ["poems"], out), out)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_logits_are_equal_to_the_bit_beside_all_other_groups(poems):
    result = poems.verification
    assert result.largest_logit_difference == 0.0 == result.allowed_difference and result.holds
    assert result.largest_logit > 0.5 and result.sequences == {"poems": 2} and result.domains_mixed == 3
    assert result.different_tensors == () and result.tensors_compared == len(poems.cut.sources)
    assert result.experts_reached == {"blocks.1": {"poems": (3, 3)}}
    assert result.probe_losses["poems"][0] == result.probe_losses["poems"][1] > 1.0


def test_the_folder_holds_what_was_found(poems):
    written = json.loads(poems.model.read_file("verification.json"))
    assert written["largest_logit_difference"] == 0.0 and written["parent_sha256"] == poems.cut.parent.sha256
    card = poems.model.read_file("README.md").decode()
    assert "largest logit difference 0.0 over 2 probe sequences in batches that mix 3 domains" in card
    assert b"code" not in poems.model.read_file("verification.json")


def test_one_byte_of_an_own_expert_is_caught(poems, parent, tmp_path):
    folder = copied(poems.model.path, tmp_path / "poems")
    tensor = "domains.poems.blocks.1.experts.up.weight"
    flip_byte(folder, tensor)  # the sign and exponent of the first weight
    result = verify(poems.cut.parent, open_checkpoint(folder), poems.cut)
    assert result.largest_logit_difference > 0.0 and result.different_tensors == (tensor,) and not result.holds


def test_the_lowest_bit_of_a_weight_is_caught_even_if_no_logit_moves(poems, tmp_path):
    folder = copied(poems.model.path, tmp_path / "poems")
    tensor = "domains.poems.blocks.1.experts.down.weight"
    flip_byte(folder, tensor, index=0)
    _, different = compare_tensors(poems.cut.parent, open_checkpoint(folder), poems.cut)
    assert different == [tensor]


def test_a_difference_in_the_first_sequence_alone_is_caught(poems, monkeypatch):
    logits_of, models = verify_sub_model._logits_of, []

    def sub_model_moved_once(trained, domains):
        logits, batches = logits_of(trained, domains), []
        models.append(trained)
        is_sub_model = len(models) == 1

        def moved(tokens, owners):
            values = logits(tokens, owners).copy()
            if is_sub_model and not batches:
                values[0, 0, 0] += 1.0
            batches.append(owners)
            return values

        return moved

    monkeypatch.setattr(verify_sub_model, "_logits_of", sub_model_moved_once)
    result = verify(poems.cut.parent, poems.model, poems.cut)
    assert result.largest_logit_difference == pytest.approx(1.0) and not result.holds


def test_a_foreign_expert_does_not_matter(poems, parent, tmp_path):
    changed = copied(parent, tmp_path / "step-00000008")
    flip_byte(changed, "domains.code.blocks.1.experts.up.weight")
    flip_byte(changed, "domains.law.blocks.1.experts.down.bias")
    other = open_checkpoint(changed)
    assert other.sha256 != poems.cut.parent.sha256
    result = verify(other, poems.model, ExtractionPlan(other, ("poems",)))
    assert result.largest_logit_difference == 0.0 and result.holds


def test_a_sub_model_that_is_another_function_gets_no_name(parent, tmp_path, monkeypatch):
    """A fault between reading and writing: what is written is not what was read."""
    cut = plan(parent, ["law"], dtype="float16")
    monkeypatch.setattr(ExtractionPlan, "converts", False)  # as if the weights had been kept
    with pytest.raises(VerificationError, match=r"not the same function: the largest logit difference is .* kept"):
        extract(cut, tmp_path / "law")
    assert not list(tmp_path.iterdir())


def test_several_domains_with_their_own_words_and_a_sparse_query_layer(tmp_path):
    sparse = {"layers": 2, "include_query_layer": True}
    parent = save_model(tmp_path / "run", domain_parameters={"embedding": "own"}, sparse=sparse)
    result = extract(plan(parent, ["code", "poems"]), tmp_path / "two").verification
    assert result.largest_logit_difference == 0.0 and result.sequences == {"code": 2, "poems": 2}
    assert set(result.experts_reached) == {"blocks.1", "query_layer"}


def test_half_precision_states_its_difference(parent, tmp_path):
    result = extract(plan(parent, ["poems"], dtype="float16"), tmp_path / "half").verification
    assert 0.0 < result.largest_logit_difference < 0.1 and result.allowed_difference is None and result.holds
    assert result.tensors_compared == 1  # the routing table, which is kept
    assert f"difference {result.largest_logit_difference:.3g}" in (tmp_path / "half" / "README.md").read_text()


def test_a_folded_model_gives_the_same_logits_to_1e_6(parent, tmp_path):
    done = extract(plan(parent, ["law"], fold=True), tmp_path / "law")
    result = done.verification
    assert result.largest_logit_difference <= 1e-6 * max(1.0, result.largest_logit) == result.allowed_difference
    assert result.different_tensors == () and result.holds


def test_without_a_probe_nothing_is_claimed(saved, tmp_path):
    parent = saved(probes=0)
    with pytest.raises(UserError, match="no probe sequences of domain law .* use verify=False"):
        extract(plan(parent, ["law"]), tmp_path / "law")
    assert not (tmp_path / "law").exists()


@pytest.mark.parametrize("kept, rows", [(["b"], 3), (["a", "c"], 3), (["a", "b", "c"], 1), (["a"], 5)])
def test_batches_hold_every_kept_sequence_once_and_foreign_ones_beside(kept, rows):
    probe = {name: np.full((rows, 9), number, np.int32) for number, name in enumerate("abc")}
    counted = []
    for tokens, owners, flags in mixed_batches(probe, kept):
        assert tokens.shape == (4, 9) and [probe[o][0, 0] for o in owners] == tokens[:, 0].tolist()
        counted += [owner for owner, flag in zip(owners, flags, strict=True) if flag]
        if len(kept) < 3:
            assert set(owners) - set(kept) and not any(flags[i] for i, o in enumerate(owners) if o not in kept)
    assert sorted(counted) == sorted(name for name in kept for _ in range(rows))
