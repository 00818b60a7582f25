"""`python -m extract …` is `pangu-sigma extract …`."""

import sys

from pangu_sigma.cli import main

if __name__ == "__main__":
    main(["extract", *sys.argv[1:]], "python -m")
