"""The error that a subcommand ends with."""


class CommandError(Exception):
    """What the user can put right, in one sentence."""
