"""Errors that the command line turns into a sentence and an exit code, and the exit codes."""

USER_ERROR, INTERRUPTED = 2, 130  # of a process that ends by a user's mistake, or by Ctrl-C


class UserError(ValueError):
    """A mistake that the user can mend; the message is one sentence that says what is wrong, where, and what to do."""


class CheckpointError(UserError):
    """A checkpoint could not be written or is refused; the message names the file or folder and says what to do."""
