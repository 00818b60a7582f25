"""The one exception family that the command line turns into a sentence and exit code 2."""


class UserError(Exception):
    """A mistake that the user can mend; the message is one sentence that says what is wrong, where, and what to do."""
