"""The doctor tries out what a training would use, skips what a machine lacks with a reason, and survives failures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pangu_sigma.doctor import check_processes, machine_checks
from pangu_sigma.doctor.ascend_software import look
from pangu_sigma.doctor.check_results import Status, failed, healthy, passed, skipped
from pangu_sigma.doctor.check_table import text
from tests.pangu_sigma.training import training_process


@pytest.fixture
def no_toolkit(monkeypatch):
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path, no_toolkit):
    """A file system as CANN, driver and two devices leave it."""
    driver = tmp_path / "usr/local/Ascend/driver"
    toolkit = tmp_path / "usr/local/Ascend/ascend-toolkit/latest"
    for folder in (driver, toolkit / "aarch64-linux", tmp_path / "dev"):
        folder.mkdir(parents=True)
    (driver / "version.info").write_text("Version=26.0.rc1\nascendhal_version=7.35.23\n")
    info = "package_name=Ascend-cann-toolkit\nversion=9.0.0\ninnerversion=V100R001C25\n"
    (toolkit / "aarch64-linux" / "ascend_toolkit_install.info").write_text(info)
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / "dev" / name).touch()
    return tmp_path


def test_a_machine_without_npus_works_and_says_why_rows_are_skipped(tmp_path):
    if look().devices:
        pytest.skip("this machine has NPUs")
    done = training_process.command("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    rows = {check["name"]: check for check in printed["checks"]}
    assert printed["healthy"]
    for name in ("Python", "MindSpore", "host memory", "step on CPU", "all-to-all, CPU processes"):
        assert rows[name]["status"] == "pass", rows[name]
    for name in ("CANN", "Ascend driver", "NPU visible", "step on NPU, against the CPU's", "all-to-all, NPUs"):
        assert (rows[name]["status"], rows[name]["found"]) == ("skipped", "no Ascend device on this machine")
    both = (rows["compiled CPU kernels"]["status"], rows["compiled kernels against composed"]["status"])
    assert both in (("pass", "pass"), ("skipped", "skipped"))
    assert "2 processes, rows and gradients exact" in rows["all-to-all, CPU processes"]["found"]
    assert list(tmp_path.iterdir()) == []


def test_what_cann_and_driver_leave_is_read(machine):
    ascend = look(machine)
    assert (ascend.devices, ascend.cann, ascend.driver) == ((0, 1), "9.0.0", "26.0.rc1")
    assert [check(ascend).status for check in (machine_checks.cann, machine_checks.driver, machine_checks.devices)] == [
        Status.passed
    ] * 3


def test_a_toolkit_that_the_environment_names_comes_first(machine, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "version.info").write_text("Version=8.0.RC3\n")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path / "mine"))
    check = machine_checks.cann(look(machine))
    assert check.status is Status.failed and "8.0.RC3" in check.found and "install CANN 9.0" in check.advice


def test_devices_without_software_fail_with_what_to_do(tmp_path, no_toolkit):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "davinci0").touch()
    ascend = look(tmp_path)
    for check in (machine_checks.cann(ascend), machine_checks.driver(ascend)):
        assert check.status is Status.failed and check.advice
    assert machine_checks.npu_exchange(ascend, 2, tmp_path, 1.0).found == "one Ascend device"


def test_a_driver_without_devices_is_a_container_that_was_not_given_any(machine):
    for device in (machine / "dev").iterdir():
        device.unlink()
    check = machine_checks.devices(look(machine))
    assert check.status is Status.failed and "--device=/dev/davinci0" in check.advice


@pytest.mark.parametrize(
    ("second", "status"), [(4.9, Status.passed), (5.1, Status.failed), (float("nan"), Status.failed)]
)
def test_a_step_that_does_not_lower_the_loss_fails(second, status):
    done = check_processes.ProcessResult([{"losses": [5.0, second], "norms": [1.0, 1.0], "seconds": [9.0, 0.1]}])
    assert machine_checks.cpu_step(done).status is status


@pytest.mark.parametrize(
    ("loss", "status"), [(5.001, Status.passed), (5.1, Status.failed), (float("nan"), Status.failed)]
)
def test_a_device_with_other_numbers_than_the_cpu_fails(machine, loss, status):
    def step(device: str, kernels: str) -> check_processes.ProcessResult:
        losses = [5.0, 4.9] if device == "CPU" else [loss, 4.9]
        return check_processes.ProcessResult([{"losses": losses, "norms": [1.0, 1.0], "seconds": [9.0, 0.1]}])

    assert machine_checks.npu_step(step, look(machine)).status is status
    broken = machine_checks.npu_step(
        lambda device, kernels: check_processes.ProcessResult([], "RuntimeError: no device"), look(machine)
    )
    assert broken.status is Status.failed and broken.found == "RuntimeError: no device"


def test_a_step_on_a_device_that_is_not_there_is_a_row_and_not_the_end(tmp_path):
    if look().devices:
        pytest.skip("this machine has NPUs")
    done = check_processes.step("Ascend", "auto", tmp_path / "step", 120.0)
    assert not done.results and "run.device" in done.trouble


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path):
    words = ["sh", "-c", "sleep 600 & echo $! > child; wait"]
    assert check_processes._ran(words, tmp_path, 1.0) == "no answer within 1 s"
    stat = Path(f"/proc/{int((tmp_path / 'child').read_text())}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "a child of the check is still running"
        time.sleep(0.05)


def test_the_table_says_what_to_do_and_the_verdict():
    rows = [passed("one", "fine"), failed("two", "broken", "mend it"), skipped("three", "not here")]
    table = text(rows)
    assert "two: mend it" in table and table.endswith("1 of 3 checks failed.") and "three: " not in table
    assert not healthy(rows) and healthy([rows[0], rows[2]])
