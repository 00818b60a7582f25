import os

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import pytest


@pytest.fixture(scope="session", autouse=True)
def graph_mode() -> None:
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
