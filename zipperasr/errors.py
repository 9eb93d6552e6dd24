"""The exceptions for what a user can mend: bad data, bad configuration, a full disk."""


class UserError(Exception):
    """Says in one line which thing is wrong, its value, and how to mend it.

    The command line prints the message without a traceback and exits with status 1.
    """


class AlreadySaid(UserError):
    """Another process of the same training fails too, and says why; the command line exits with status 1."""


class TooLong(UserError):
    """There is more audio than is taken."""
