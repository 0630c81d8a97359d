"""The two ways in which a command ends other than well, and their exit codes."""


class UserError(Exception):
    """Bad config, input or environment: exit code 2.

    The message is one line that says what is wrong, where, and how to fix it. Raised before any
    expensive work.
    """

    exit_code = 2


class RunStoppedError(Exception):
    """A run that stopped itself with its state kept (non-finite loss, SIGTERM): exit code 3."""

    exit_code = 3


class AskedToStopError(RunStoppedError):
    """A run that SIGTERM or Ctrl-C ended with its state kept: it is to be resumed."""
