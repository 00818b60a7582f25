"""The proof of coverage: each way in which a conversion may not be whole is an error that lists the tensors."""

import pytest

from pangu_sigma.convert.conversion_coverage import check_coverage
from pangu_sigma.errors import UserError

TARGETS = {"a": (2, 3), "b": (4,)}
WHOLE = [("a", "old.a", (2, 3)), ("b", "old.b", (4,))]


def test_a_whole_conversion_passes():
    check_coverage("x", TARGETS, WHOLE, ["old.a", "old.b"])
    # one source may serve two
    check_coverage("x", {**TARGETS, "c": (4,)}, [*WHOLE, ("c", "old.b", (4,))], ["old.a", "old.b"])


@pytest.mark.parametrize(
    ("assigned", "sources", "message"),
    [
        (WHOLE[:1], ["old.a"], "lacks what these tensors need: b"),
        (WHOLE, ["old.a", "old.b", "old.c"], "has tensors that the model does not: old.c"),
        ([*WHOLE, ("c", "old.c", (1,))], ["old.a", "old.b", "old.c"], r"the model does not: old.c \(as c\)"),
        ([*WHOLE, ("b", "new.b", (4,))], ["old.a", "old.b", "new.b"], r"twice: b \(from old.b and new.b\)"),
        ([("a", "old.a", (3, 2)), WHOLE[1]], ["old.a", "old.b"], r"shape: old.a \[3, 2\] where \[2, 3\] is needed"),
    ],
)
def test_each_fault_is_listed(assigned, sources, message):
    with pytest.raises(UserError, match=message):
        check_coverage("the source", TARGETS, assigned, sources)
