"""`python -m extract …` is `pangu-sigma extract …`."""

import os
import sys

from pangu_sigma.cli import app

if __name__ == "__main__":
    # Before anything imports MindSpore, whose C++ side otherwise logs over the terminal.
    os.environ.setdefault("GLOG_v", "4")
    app(["extract", *sys.argv[1:]], prog_name="python -m")
