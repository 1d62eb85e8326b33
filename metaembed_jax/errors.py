"""The one exception for what a user can put right."""


class UserError(ValueError):
    """One clear line that names what is wrong and what to do; the command line prints it alone and exits with 2."""
