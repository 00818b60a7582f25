"""The error of this package: a checkpoint that cannot be written, or must not be used."""

from pangu_sigma.errors import UserError


class CheckpointError(UserError):
    """A checkpoint could not be written or is refused; the message names the file or folder and says what to do."""
