"""What a run writes about its steps can be trusted after a kill, a resume and a number that is not finite."""

import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.monitor import MetricsLog, read_metrics


def train(log, step, loss=2.5, **more):
    log.train(
        step,
        loss=loss,
        losses={"code": loss, "法律": loss + 1},
        tokens={"code": 512, "法律": 512},
        learning_rate=1e-3,
        gradient_norm=0.7,
        tokens_per_second=900.0,
        flops_per_second=1e9,
        seconds=0.5,
        **more,
    )


def write_run(folder, steps):
    with MetricsLog(folder) as log:
        for step in steps:
            train(log, step)


def test_every_kind_comes_back_as_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        train(log, 10, expert_load={"blocks.3": {"code": np.array([3, 5])}}, loss_scale=np.float32(65536))
        log.evaluate(10, losses={"code": 2.0}, unigram={"code": 6.0}, tokens={"code": 4096})
        log.checkpoint(10, path=tmp_path / "step-10", bytes_written=10, bytes_linked=5, seconds=0.1)
        log.event(10, "a message\nof two lines")
    records = read_metrics(tmp_path)
    assert [r["kind"] for r in records] == ["train", "evaluate", "checkpoint", "event"]
    assert records[0]["expert_load"] == {"blocks.3": {"code": [3, 5]}}
    assert records[0]["losses"] == {"code": 2.5, "法律": 3.5}
    assert records[0]["loss_scale"] == 65536 and records[0]["auxiliary_loss"] is None
    assert records[3]["message"] == "a message\nof two lines"


def test_each_record_is_on_disk_before_the_next_step(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.event(step, "here")
        assert len(read_metrics(tmp_path)) == step
    log.close()


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        train(log, 1, loss=math.nan, dropped_share={"blocks.3": {"code": -math.inf}})
        train(log, 2, loss=np.float32("inf"))
        log.event(2, "nan")

    def refuse(name):
        raise AssertionError(name)

    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0], parse_constant=refuse)["loss"] == "nan"
    first, second, event = read_metrics(tmp_path)
    assert math.isnan(first["loss"]) and math.isnan(first["losses"]["code"])
    assert first["dropped_share"]["blocks.3"]["code"] == -math.inf
    assert second["loss"] == math.inf
    assert event["message"] == "nan"


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    write_run(tmp_path, [10, 20, 30, 40])
    with MetricsLog(tmp_path, resume_step=20) as log:
        assert log.dropped_lines == 2
        train(log, 30, loss=1.0)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(10, 2.5), (20, 2.5), (30, 1.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_keeps_the_earlier_lines_byte_for_byte(tmp_path):
    write_run(tmp_path, [10, 20, 30])
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    MetricsLog(tmp_path, resume_step=20).close()
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == before[:2]


def test_a_torn_last_line_is_passed_over_and_gone_after_resume(tmp_path):
    write_run(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind":"train","step":30,"lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20]
    with MetricsLog(tmp_path, resume_step=30) as log:
        assert log.dropped_lines == 1
        train(log, 40)
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 40]


def test_a_last_line_without_its_line_break_is_whole(tmp_path):
    write_run(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip())
    with MetricsLog(tmp_path, resume_step=20) as log:
        train(log, 30)
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize("damage", [b"\x00\xff\x00", b"[]", b'{"kind":"train"}', b'{"kind":"train","step":"1"}', b"7"])
def test_damage_before_the_last_line_is_refused_with_its_number(tmp_path, damage):
    write_run(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, second, b""]))
    with pytest.raises(UserError, match="metrics.jsonl is damaged: line 2"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="line 2"):
        MetricsLog(tmp_path, resume_step=10)
    assert damage in path.read_bytes()


def test_a_new_run_does_not_write_into_an_old_one(tmp_path):
    write_run(tmp_path, [10])
    with pytest.raises(UserError, match="go on with resume=True"):
        MetricsLog(tmp_path)
    MetricsLog(tmp_path, resume_step=-1).close()
    assert read_metrics(tmp_path) == []


def test_a_step_evaluated_again_has_one_value(tmp_path):
    with MetricsLog(tmp_path) as log:
        for loss in (2.0, 1.5):
            log.evaluate(10, losses={"code": loss}, unigram={"code": 6.0}, tokens={"code": 1})
            log.event(10, "evaluated")
    assert [r.get("losses") for r in read_metrics(tmp_path)] == [None, {"code": 1.5}, None]


def test_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("record", [{"kind": "other", "step": 1}, {"kind": "event"}, {"kind": "event", "step": 1.5}])
def test_a_record_without_kind_or_step_is_refused(tmp_path, record):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError):
        log.write(record)


def test_a_full_disk_leaves_whole_lines_and_a_sentence(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = MetricsLog(tmp_path)
    try:
        log.event(1, "fits")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(UserError, match="make room"):
            log.event(2, "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
        log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    code = (
        "import sys; from pangu_sigma.monitor.metrics_log import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "for step in range(10**9): log.event(step, 'x' * 200)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    path = tmp_path / "metrics.jsonl"
    while not path.exists() or path.stat().st_size < 100_000:
        assert process.poll() is None
    process.kill()
    process.wait()
    steps = [r["step"] for r in read_metrics(tmp_path)]
    assert steps == list(range(len(steps))) and len(steps) > 100


def tensorboard_events(folder):
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event()
            event.ParseFromString(data[12 : 12 + length])
            yield event
            data = data[16 + length :]


def test_tensorboard_gets_the_scalars_and_is_told_of_the_resume(tmp_path):
    with MetricsLog(tmp_path, tensorboard=True) as log:
        train(log, 10, expert_load={"blocks.3": {"code": [30, 10]}}, dropped_share={"blocks.3": {"code": 0.25}})
        train(log, 20)
    with MetricsLog(tmp_path, tensorboard=True, resume_step=10) as log:
        log.evaluate(20, losses={"code": 2.0}, unigram={}, tokens={})
    events = list(tensorboard_events(tmp_path / "tensorboard"))
    scalars = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert scalars["train/loss", 10] == 2.5
    assert scalars["train_loss/code", 20] == 2.5
    assert scalars["expert_load_max_over_mean/blocks.3/code", 10] == 1.5
    assert scalars["dropped_share/blocks.3/code", 10] == 0.25
    assert scalars["validation_loss/code", 20] == 2.0
    assert any(e.HasField("session_log") and e.step == 11 for e in events)


def test_a_disk_that_takes_no_tensorboard_file_neither_ends_nor_stops_the_run(tmp_path, monkeypatch, capsys):
    with MetricsLog(tmp_path, tensorboard=True) as log:

        def fail(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", fail)
        for step in range(50):
            log.evaluate(step, losses={"code": 1.0}, unigram={}, tokens={})
    records = read_metrics(tmp_path)
    assert sum(record["kind"] == "evaluate" for record in records) == 50
    (event,) = (record for record in records if record["kind"] == "event")
    assert "tensorboard cannot be written (Input/output error)" in event["message"]


def test_tensorboard_is_imported_only_when_asked_for(tmp_path):
    code = (
        "import sys; from pangu_sigma.monitor import MetricsLog, read_metrics\n"
        f"MetricsLog({str(tmp_path)!r}).close()\n"
        "assert not {'tensorboardX', 'numpy', 'mindspore', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
