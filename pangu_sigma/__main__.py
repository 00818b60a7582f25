"""`python -m pangu_sigma` is `pangu-sigma`."""

from pangu_sigma.cli import main

if __name__ == "__main__":
    main()
