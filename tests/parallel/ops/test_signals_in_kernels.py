"""Signals that come while a compiled kernel computes.

oneDNN's matrix product of a long sum (more than 2,048 terms on AVX-512) keeps its stack pointer in memory of the heap:
a signal's frame, which the system puts below the stack pointer, then overwrites whatever lies there.
"""

import subprocess
import sys

import pytest

HAMMERED = """
import ctypes, signal, sys, threading
from pangu_sigma import runtime
runtime.prepare("CPU")
import numpy as np
from parallel.ops.compiled_kernels import library
path = library()
if path is None:
    sys.exit("no compiled kernels")
affine = ctypes.CDLL(path).pangu_sigma_affine
came, done, main = 0, False, threading.get_ident()

def count(number, frame):
    global came
    came += 1

signal.signal(signal.SIGURG, count)

def hammer():
    while not done:
        signal.pthread_kill(main, signal.SIGURG)

x, w, y = (np.ones(shape, np.float32) for shape in ((512, 4096), (4096, 64), (512, 64)))
tensors = (ctypes.c_void_p * 3)(*(a.ctypes.data for a in (x, w, y)))
shapes = (ctypes.POINTER(ctypes.c_int64) * 3)(*((ctypes.c_int64 * 2)(*a.shape) for a in (x, w, y)))
thread = threading.Thread(target=hammer)
thread.start()
for _ in range(150):
    assert affine(3, tensors, None, shapes, None, None, None) == 0
done = True
thread.join()
assert came > 20, came
assert (y == 4096).all()
print("whole")
"""


def test_a_signal_while_a_kernel_computes_overwrites_nothing():
    done = subprocess.run([sys.executable, "-c", HAMMERED], capture_output=True, text=True, timeout=300)
    if "no compiled kernels" in done.stderr:
        pytest.skip("the kernels are not compiled here")
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]
