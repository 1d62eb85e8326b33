"""Configs of the package and of users: Python files with `get_config(arg) -> RunConfig`."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from metaembed_jax.config.keys import apply_flags, with_keys
from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError, one_line
from metaembed_jax.files import is_bucket

# The configs of the package: inside it if it is installed, next to it in a checkout.
CONFIGS = next(folder for root in Path(__file__).parents[1:3] if (folder := root / "configs").is_dir())


def load_config(flag: str, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read `--config=NAME[:ARG]`, a config of the package or a file.

    Args:
      overrides: {key: value} of the flags `--config.key=value`.

    Raises:
      UserError: no such file, a file without a config, an unknown key, or a value that is not allowed.
    """
    path, _, argument = flag.partition(":")
    known = config_names()
    if path in known:
        path = str(CONFIGS / f"{path}.py")
    elif not Path(path).is_file():
        raise UserError(
            f"{path}: no such file or config; expected {', '.join(known)}, or a file ({Path(path).absolute()} does not exist)"
        )
    spec = importlib.util.spec_from_file_location("metaembed_config", path) if names_config(path) else None
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: expected a Python file with get_config(arg), such as {CONFIGS / 'tiny.py'}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument or None)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a config is a program, which can raise anything
        raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: get_config returns a {type(config).__name__}; expected a metaembed_jax.config.RunConfig")
    return apply_flags(_with_start(config, Path(path)), overrides or {})


def _with_start(config: RunConfig, file: Path) -> RunConfig:
    """Return a config whose relative `init_from` is the absolute path next to its file, if only that exists."""
    path, colon, argument = config.init_from.partition(":")
    beside = file.absolute().parent / path
    if not path or is_bucket(config.init_from) or path in config_names() or Path(path).exists() or not beside.exists():
        return config
    return with_keys(config, {"init_from": f"{beside}{colon}{argument}"})


def config_names() -> list[str]:
    """Return the names of the package's configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def names_config(text: str) -> bool:
    """Return whether a text is NAME[:ARG] of a config, not a path or id of weights."""
    name = text.partition(":")[0]
    return name.endswith(".py") or name in config_names()
