"""With several test processes (pytest -n), each keeps to a processor of its own.

MindSpore, PyTorch and the compiled kernels start as many threads as they may use processors, and their waiting threads
spin: two processes on the same two processors take several times as long as on one each.
"""

import os
import signal

# MindSpore reads it as it is imported, which a test may do before the product does.
os.environ.setdefault("GLOG_v", "4")


def pytest_configure() -> None:
    # A shell that starts the tests in the background has Ctrl-C ignored, and so would have what they start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})
