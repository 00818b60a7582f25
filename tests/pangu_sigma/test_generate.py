"""Text from a trained run: decided by the seed, by the domain's experts, ending where it should."""

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.generate import Generator, continue_text, pick_domain
from pangu_sigma.load import load_trained
from tests.pangu_sigma.train.process import assert_refused, command


@pytest.fixture(scope="module")
def trained(finished_run):
    return load_trained(finished_run)


@pytest.fixture(scope="module")
def generator(trained):
    return Generator(trained.model)


def test_the_command_continues_the_prompt(trained, generator, finished_run, tmp_path):
    done = command("generate", finished_run, "--domain", "code", "--prompt", "def return", "--max-tokens", "5",
                   "--seed", "3", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def return")
    # Another process with the same seed writes the same.
    again = continue_text(generator, trained.tokenizer, "code", "def return", 5, temperature=0.8, top_k=40, seed=3)
    assert done.stdout == again + "\n"


def test_the_seed_decides(generator):
    def written(seed: int) -> list[int]:
        return generator.continue_ids([2, 100, 101], "law", 8, temperature=5.0, top_k=0, seed=seed)

    assert written(1) == written(1)
    assert len({tuple(written(seed)) for seed in range(4)}) == 4


def test_temperature_zero_takes_the_likeliest(generator):
    ids = [2, 100, 101]
    first = int(np.argmax(generator.next_logits(ids, "law")))
    assert generator.continue_ids(ids, "law", 1, temperature=0.0) in ([first], [])
    assert generator.continue_ids(ids, "law", 1, temperature=1.0, top_k=1, seed=9) in ([first], [])


def test_only_the_likeliest_k_are_drawn(generator):
    ids = [2, 100, 101]
    best = set(np.argsort(generator.next_logits(ids, "law"))[-3:].tolist())
    drawn = {t for seed in range(20) for t in generator.continue_ids(ids, "law", 1, 50.0, top_k=3, seed=seed)}
    assert len(drawn) > 1 and drawn <= best


def test_domains_write_with_their_own_experts(generator):
    logits = [generator.next_logits([2, 100, 101], domain) for domain in ("code", "law")]
    assert not np.array_equal(*logits)


def test_what_follows_a_prompt_does_not_see_the_filling_behind_it(generator):
    """The window is filled up behind the text; causal attention must not look there."""
    short = generator.next_logits([2, 100], "law")
    window = generator.signature.length
    assert np.isfinite(short).all()
    np.testing.assert_array_equal(
        generator.next_logits(list(range(40)) + list(range(100, 100 + window)), "law"),
        generator.next_logits(list(range(100, 100 + window)), "law"),
    )


def test_an_unknown_domain_names_the_nearest(finished_run, tmp_path):
    with pytest.raises(UserError, match=r"no domain 'lwa'; did you mean 'law'\?"):
        pick_domain(["code", "law"], "lwa")
    with pytest.raises(UserError, match="has the domains code, law: choose one with --domain"):
        pick_domain(["code", "law"], None)
    assert pick_domain(["law"], None) == "law"
    done = command("generate", finished_run, "--domain", "poem", "--prompt", "x", cwd=tmp_path)
    assert_refused(done, "did you mean 'poems'?")
