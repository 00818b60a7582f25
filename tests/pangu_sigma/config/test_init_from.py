"""A run can begin with another model's weights if it describes the same network; what differs is named."""

from __future__ import annotations

import pytest

from pangu_sigma.config import check_init_from, check_resume, with_init_from_of, with_tokenizer_of
from pangu_sigma.errors import UserError


@pytest.fixture
def model(small):
    """The configuration inside the model folder."""
    return small("model.sparse.layers=1", "model.vocab_size=384", "data.tokenizer.vocab_size=384")


def beginning(small, *changes):
    return small("model.sparse.layers=1", "run.init_from=folder", *changes)


def test_how_it_trains_may_differ(small, model):
    changes = (
        "model.dropout=0.1", "model.sparse.resample=true", "model.sparse.dispatch=capacity", "train.steps=99",
        "optimizer.learning_rate=1e-5", "run.seed=5", "domains.code.weight=9", "data.sequence_length=64",
    )  # fmt: skip
    check_init_from(model, beginning(small, *changes))


def test_every_key_that_differs_is_named(small, model):
    config = beginning(
        small, "model.hidden=1024", "model.activation=gelu", "model.sparse.layers=2", "domains.docs.experts=3",
        "model.vocab_size=5000",
    )  # fmt: skip
    with pytest.raises(UserError) as refusal:
        check_init_from(model, config)
    for key in ("model.hidden", "model.activation", "model.sparse.layers", "domains.docs.experts", "model.vocab_size"):
        assert f"{key} is " in str(refusal.value)
    assert "domains.docs.experts is 2 there and 3 here" in str(refusal.value)


def test_domains_must_be_the_folders(small, model):
    from pangu_sigma.config import config_from_dict

    values = beginning(small).to_dict()
    added = {**values, "domains": [*values["domains"], {**values["domains"][0], "name": "law"}]}
    with pytest.raises(UserError, match="folder has no domain law: leave it out"):
        check_init_from(model, config_from_dict(added))
    with pytest.raises(UserError, match="folder also has the domain docs: list it too, or cut"):
        check_init_from(model, config_from_dict({**values, "domains": values["domains"][:1]}))
    with pytest.raises(UserError, match="has the domains code, docs in this order"):
        check_init_from(model, config_from_dict({**values, "domains": values["domains"][::-1]}))


def test_the_tokenizer_section_is_the_folders(small, model):
    config = with_tokenizer_of(beginning(small), model)
    assert config.data.tokenizer.vocab_size == config.model.vocab_size == 384
    assert config.run.init_from == beginning(small).run.init_from


def test_a_resumption_need_not_repeat_where_the_run_began(small, model):
    stored = with_tokenizer_of(beginning(small), model)
    again = with_init_from_of(small("model.sparse.layers=1"), stored)
    assert again.run.init_from == stored.run.init_from
    check_resume(stored, again, 4)
    assert with_init_from_of(small(), small()) == small()


def test_a_run_does_not_begin_with_itself(small):
    with pytest.raises(UserError, match="is run.dir itself: set run.dir to a new folder"):
        small("run.dir=runs/a", "run.init_from=./runs/../runs/a")
