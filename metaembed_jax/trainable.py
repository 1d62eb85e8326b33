"""Trainable and frozen parameters of a run.

`config.model.trained` is a table of (pattern of parameter paths, "full" or "lora"), with patterns as in `fnmatch`:

    ("backbone.layers.*.kernel", "lora")    these kernels are frozen; an adapter next to each of them trains
    ("meta_tokens", "full")                 the parameter trains
    all other parameters                    are frozen: no gradient, no optimizer state, not in the run's checkpoints

Parameters are nested dicts; a path is their keys, joined by dots.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from flax.traverse_util import flatten_dict, unflatten_dict

from metaembed_jax.errors import UserError

OPTIONAL = ("head.kernel",)  # a pattern may match it even if the config has no head
LORA = ".lora."  # in the path of every parameter of an adapter

Table = Sequence[tuple[str, str]]


def trainable_paths(table: Table, paths: Iterable[str]) -> frozenset[str]:
    """Select the paths that train from all paths of a network.

    Raises:
      UserError: a pattern matches nothing, or trains a kernel with an adapter.
    """
    paths = sorted(paths)
    adapted = {path.split(LORA)[0] + ".kernel" for path in paths if LORA in path}
    trained = {path for path in paths if LORA in path}
    for pattern, method in table:
        matches = [path for path in paths if fnmatchcase(path, pattern) and LORA not in path]
        if not matches and not any(fnmatchcase(path, pattern) for path in OPTIONAL):
            raise UserError(f"config.model.trained: {pattern!r} matches none of the parameters {', '.join(paths)}")
        if method == "full" and (both := sorted(adapted.intersection(matches))):
            raise UserError(f"config.model.trained: {pattern!r} trains {both[0]} in full, and another pattern gives it an adapter")
        trained.update(matches if method == "full" else ())
    return frozenset(trained)


def split(parameters: dict, trained: frozenset[str]) -> tuple[dict, dict]:
    """Return the parameters that train and those that are frozen, both as nested dicts."""
    flat = flatten_dict(parameters, sep=".")
    trainable = {path: leaf for path, leaf in flat.items() if path in trained}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trainable, sep="."), unflatten_dict(frozen, sep=".")


def join(*trees: dict) -> dict:
    """Merge nested dicts that share no path; inverse of `split`."""
    return unflatten_dict({path: leaf for tree in trees for path, leaf in flatten_dict(tree, sep=".").items()}, sep=".")


def paths(parameters: dict) -> frozenset[str]:
    """Return the paths of nested dicts."""
    return frozenset(flatten_dict(parameters, sep="."))
