"""Sampling against plain arithmetic and Hugging Face's processors; draws follow the probabilities they should."""

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.generation import Sampling
from pangu_sigma.generation.sampling import likeliest, log_softmax, sample_token

LOGITS = np.array([2.0, 1.0, 0.5, -1.0, -1.5, 0.0], np.float32)


def frequencies(sampling: dict, seen=(), logits=LOGITS, draws: int = 4000) -> np.ndarray:
    drawn = [sample_token(logits, Sampling(seed=7, **sampling), index, seen) for index in range(draws)]
    return np.bincount(drawn, minlength=logits.size) / draws


def softmax(values) -> np.ndarray:
    p = np.exp(np.asarray(values, np.float64) - np.max(values))
    return p / p.sum()


def close(logprobs: np.ndarray, expected: np.ndarray) -> bool:
    """Within five standard deviations of 4000 draws, and nothing drawn that cannot be."""
    return bool((np.abs(logprobs - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature):
    assert close(frequencies({"temperature": temperature}), softmax(LOGITS / temperature))


def test_top_k_and_top_p_leave_the_likeliest():
    p = softmax(LOGITS)
    kept = np.where(LOGITS >= 0.5, p, 0)
    assert close(frequencies({"temperature": 1.0, "top_k": 3}), kept / kept.sum())
    # The first two hold 0.72 of the probability, the first three 0.85.
    assert close(frequencies({"temperature": 1.0, "top_p": 0.8}), kept / kept.sum())
    assert close(frequencies({"temperature": 1.0, "top_p": 1e-9}), np.eye(6)[0])
    assert close(frequencies({"temperature": 9.0, "top_k": 1}), np.eye(6)[0])


def test_greedy_takes_the_lower_id_among_equals():
    assert sample_token(np.array([0.0, 3.0, 3.0], np.float32), Sampling(temperature=0.0), 0, ()) == 1


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    expected = softmax([1.0, 1.0, 0.5, -2.0, -1.5, 0.0])
    assert close(frequencies({"temperature": 1.0, "repetition_penalty": 2.0}, seen={0, 3}), expected)
    assert sample_token(LOGITS, Sampling(temperature=0.0, repetition_penalty=4.0), 0, {0}) == 1


def test_rules_agree_with_hugging_face():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    rng = np.random.default_rng(0)
    for top_k, top_p, penalty, temperature in ((7, 0.6, 1.3, 0.7), (20, 0.9, 0.8, 1.5), (50, 0.3, 2.0, 1.0)):
        logits = rng.standard_normal(50).astype(np.float32) * 3
        seen = [3, 9, 30]
        ids, scores = torch.tensor([seen]), torch.tensor(logits)[None]
        for processor in (
            processors.RepetitionPenaltyLogitsProcessor(penalty), processors.TemperatureLogitsWarper(temperature),
            processors.TopKLogitsWarper(top_k), processors.TopPLogitsWarper(top_p),
        ):  # fmt: skip
            scores = processor(ids, scores)
        expected = torch.softmax(scores, -1)[0].double().numpy()
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
        assert close(frequencies(sampling, seen=seen, logits=logits), expected)


def test_draws_are_counted():
    sampling = Sampling(temperature=1.0, seed=3)
    wide = np.zeros(1000, np.float32)
    drawn = [sample_token(wide, sampling, index, ()) for index in range(8)]
    assert drawn == [sample_token(wide, sampling, index, ()) for index in range(8)] and len(set(drawn)) > 5
    assert drawn != [sample_token(wide, Sampling(temperature=1.0, seed=4), index, ()) for index in range(8)]


def test_log_probabilities_are_those_of_the_softmax_and_the_best_come_first():
    logprobs = log_softmax(LOGITS)
    np.testing.assert_allclose(np.exp(logprobs), softmax(LOGITS), rtol=1e-12)
    assert [i for i, _ in likeliest(logprobs, 3)] == [0, 1, 2]
    assert likeliest(logprobs, 0) == () and len(likeliest(logprobs, 99)) == 6
    assert [i for i, _ in likeliest(np.zeros(5), 2)] == [0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"max_tokens": -1, "echo": True}, {"temperature": -0.1}, {"temperature": float("nan")},
        {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}, {"stop": ("a", "")},
        {"logprobs": -1},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError, match="; (give|leave)"):
        Sampling(**wrong)
