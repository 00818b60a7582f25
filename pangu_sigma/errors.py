"""The one exception family that the command line turns into a sentence and an exit code, and the exit codes."""

USER_ERROR, INTERRUPTED = 2, 130  # of a process that ends by a user's mistake, or by Ctrl-C


class UserError(Exception):
    """A mistake that the user can mend; the message is one sentence that says what is wrong, where, and what to do."""
