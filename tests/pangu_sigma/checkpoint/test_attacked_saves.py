"""Saves under attack: killed or failing at every file operation, and single bits flipped in every file."""

import errno
import json

import pytest

from tests.file_faults import under_faults


def attack(scratch, kind: object, every: int) -> dict[str, int]:
    done = under_faults("tests.pangu_sigma.checkpoint.attacked_saves", scratch, kind, every)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, every):
    counts = attack(tmp_path, "kill", every)
    assert counts["operations"] * every > 70 and counts["old"] and counts["new"]


@pytest.mark.parametrize(("number", "every"), [
    (errno.EIO, 13),
    pytest.param(errno.EIO, 1, marks=pytest.mark.slow),
    *(pytest.param(number, 6, marks=pytest.mark.slow)
      for number in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)),
])  # fmt: skip
def test_a_disk_that_fails_at_any_file_operation_is_one_sentence(tmp_path, number, every):
    counts = attack(tmp_path, number, every)
    assert counts["operations"] * every > 60 and counts["old"] and counts["new"]


@pytest.mark.parametrize("flips", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_any_file_is_refused_by_name_and_does_not_spread(tmp_path, flips):
    counts = attack(tmp_path, "flip", flips)
    assert counts["refused"] == counts["flips"] == flips * counts["files"] and counts["files"] > 8
    assert counts["written anew"] >= counts["flips"] // 2  # the files that the next save would have linked
