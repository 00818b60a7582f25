"""The runner of the long benchmarks: real processes, what is finished is not run again, a failure is told."""

import sys

import pytest

from benchmarks.runs import Failed, Job, run_all


def job(folder, name: str, code: str = "", after=lambda: None) -> Job:
    made = folder / f"{name}.made"
    program = code or f"open({str(made)!r}, 'a').write('x')"
    return Job(name, lambda: [sys.executable, "-c", program], folder / "logs" / f"{name}.log", made.exists, after)


def test_every_job_runs_once_and_what_is_finished_not_again(tmp_path):
    tidied = []
    jobs = [job(tmp_path, name, after=lambda name=name: tidied.append(name)) for name in "abc"]
    (tmp_path / "b.made").write_text("before")
    run_all(jobs, 2)
    assert [(tmp_path / f"{name}.made").read_text() for name in "abc"] == ["x", "before", "x"]
    assert sorted(tidied) == ["a", "c"]


def test_a_job_that_ends_without_its_result_is_a_failure_with_its_last_words(tmp_path):
    with pytest.raises(Failed, match="a: no such corpus"):
        run_all([job(tmp_path, "a", "print('reading'); print('no such corpus'); print()")], 1)
