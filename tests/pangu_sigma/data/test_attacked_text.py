"""A disk that fails while text is tokenised: one sentence that names the file, whatever it is, and a whole cache."""

import errno
import json

import pytest

from tests.file_faults import under_faults


@pytest.mark.parametrize(("number", "every"), [
    (errno.EIO, 30), (-errno.EIO, 40),
    *(pytest.param(number, 1, marks=pytest.mark.slow) for number in (errno.EIO, -errno.EIO, errno.EDQUOT, errno.EROFS)),
])  # fmt: skip
def test_a_disk_that_fails_while_tokenising_is_one_sentence(tmp_path, number, every):
    done = under_faults("tests.pangu_sigma.data.attacked_text", tmp_path, number, every)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] >= counts["operations"] // 2 > 0
