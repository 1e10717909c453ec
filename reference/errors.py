"""What can go wrong with an oracle, and the exit code that each failure stands for."""


class OracleError(Exception):
    """An oracle cannot be located, imported, or asked what it was asked."""

    exit_code = 3


class RequestError(OracleError):
    """The request is wrong: it names an oracle, an operation or a setting that does not exist."""

    exit_code = 4


class FetchError(OracleError):
    """An archive is missing, is not the one that was pinned, or is unfit to be unpacked."""
