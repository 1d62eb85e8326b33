"""The exception for mistakes that the user can correct."""


class UserError(ValueError):
    """One line that names what is wrong and what to do. The command line prints it without a traceback and exits with 2."""
