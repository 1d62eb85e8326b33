"""Flags of the commands, and errors as one line with exit code 2."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from metaembed_jax import files
from metaembed_jax.errors import UserError, printable


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as `UserError`."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the flag `--config`.

    A command reads it with `load_config`, after `connect_hosts`: a config is a program, which may use JAX.
    """
    parser.add_argument(
        "--config",
        required=required,
        metavar="NAME[:ARG]",
        help="a config of the package, such as tiny, or a file with get_config(arg); "
        "any key of it can be set, as in --config.optimizer.learning_rate=1e-3",
    )


def split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return ({key: value} of the flags `--config.key=value`, all other flags).

    Raises:
      UserError: such a flag has no value.
    """
    overrides, rest = {}, []
    for argument in argv:
        if argument.startswith("--config."):
            key, equals, value = argument.removeprefix("--config.").partition("=")
            if not equals:
                raise UserError(f"{argument}: write --config.{key}=VALUE")
            overrides[key] = value
        else:
            rest.append(argument)
    return overrides, rest


def count(text: str) -> int:
    """Parse a flag's non-negative integer."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a non-negative integer")
    return int(text)


def any_path(text: str) -> Path:
    """Parse a flag's path on a disk or in a bucket, gs://BUCKET/PATH."""
    with argument_errors():
        return files.any_path(text)


def local_path(text: str) -> Path:
    """Parse a flag's path on a disk."""
    with argument_errors():
        return files.local_path(text)


def model_name(text: str) -> str:
    """Parse a flag's model: a path on a disk or in a bucket, or an id on the hub."""
    with argument_errors():
        return files.check_scheme(text)


@contextlib.contextmanager
def argument_errors() -> Iterator[None]:
    """Turn a `UserError` into an error of argparse, which names the flag."""
    try:
        yield
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if reason := files.bucket_reason(error):
            print(f"error: {files.BUCKET}: {printable(reason)}", file=sys.stderr)
        elif isinstance(error, OSError):  # of a path or a disk, with the system's message
            print(f"error: {ascii(error.filename) + ': ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
