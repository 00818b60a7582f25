"""The command line `pangu-sigma`: arguments and printing, one file a command group."""

from pangu_sigma.cli.command_line import app, main

__all__ = ["app", "main"]
