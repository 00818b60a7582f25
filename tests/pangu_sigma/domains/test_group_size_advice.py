"""Proposed group sizes: more to who has more text or more left to learn, all experts dealt out."""

from __future__ import annotations

import pytest

from pangu_sigma.domains.group_size_advice import advice_text, advise, deal, proposals
from pangu_sigma.domains.list_domains import DomainFacts
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.metrics_log import MetricsLog, read_metrics


def facts(**sizes: int) -> dict[str, DomainFacts]:
    rest = (0, (), 0, 0, None, None, None)
    return {name: DomainFacts(name, {"blocks.0": n}, 1000 * n, *rest) for name, n in sizes.items()}


def test_experts_follow_the_square_root_of_the_text_and_what_is_left_of_the_loss():
    same = dict.fromkeys("abc", 6.0)
    advices = proposals(facts(a=2, b=2, c=2), {"a": 160_000, "b": 40_000, "c": 10_000}, {**same, "c": 3.0}, same, 13)
    assert [round(a.claim / advices[-1].claim, 6) for a in advices] == [8.0, 4.0, 1.0]
    assert [a.proposed for a in advices] == [8, 4, 1]
    assert advices[0].tokens_per_parameter == pytest.approx(160_000 / 8 / 1000)
    text = advice_text(advices, "run")
    assert "resize run --name a --experts 8" in text and "c would get fewer" in text


@pytest.mark.parametrize("total", range(3, 30))
def test_all_are_dealt_out_and_nobody_goes_without(total):
    dealt = deal({"a": 0.9, "b": 0.09, "c": 0.01}, total)
    assert sum(dealt.values()) == total and min(dealt.values()) >= 1 and dealt["a"] >= dealt["b"] >= dealt["c"]
    equal = deal(dict.fromkeys("abc", 1.0), total)
    assert sum(equal.values()) == total and max(equal.values()) - min(equal.values()) <= 1


def test_a_run_is_advised_from_its_text_and_its_last_evaluation(copied_run):
    run = copied_run(12)
    advices = advise(run)
    assert sum(a.proposed for a in advices) == sum(a.experts for a in advices) == 5
    assert all(0 < a.left <= 1 and a.loss is not None and a.tokens > 0 for a in advices)
    with pytest.raises(UserError, match="set it higher"):
        advise(run, 2)


def test_a_loss_is_compared_with_the_unigram_loss_of_the_text_that_it_was_measured_on(copied_run):
    run = copied_run(12)
    *_, last = (record for record in read_metrics(run) if record["kind"] == "evaluate")
    with MetricsLog(run, resume_step=12) as log:
        log.write({**last, "unigram": {**last["unigram"], "code": 9.0}})
    (code,) = (advice for advice in advise(run) if advice.name == "code")
    assert code.unigram == 9.0 and code.left == code.loss / 9.0
