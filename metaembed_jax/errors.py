"""The exception for mistakes that the user can correct, and texts for one line of a terminal."""

LONGEST, LONGEST_VALUE = 1000, 100  # characters of an error, and of a value in it


class UserError(ValueError):
    """One line that names what is wrong and what to do. The command line prints it without a traceback and exits with 2.

    The middle of a very long line is left out.
    """

    def __init__(self, message: str):
        super().__init__(_cut(message, LONGEST))


def shortened(value: object) -> str:
    """Return the repr of a value for an error, without its middle if it is long."""
    return _cut(repr(value), LONGEST_VALUE)


def one_line(error: BaseException) -> str:
    """Return an error's text on one line; the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Return a text for one line of a terminal, with special characters escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _cut(text: str, most: int) -> str:
    half = (most - len(" ... ")) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"
