import os

os.environ.setdefault("GLOG_v", "4")

import pytest


@pytest.fixture(scope="session", autouse=True)
def graph_mode() -> None:
    from pangu_sigma import runtime

    runtime.prepare("CPU")
