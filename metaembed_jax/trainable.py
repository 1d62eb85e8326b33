"""Which parameters train, and which a run leaves as its base has them.

`config.model.trained` is a table of (pattern of parameter paths, "full" or "lora"), with patterns as in `fnmatch`:

    ("backbone.layers.*.kernel", "lora")    these kernels are frozen; an adapter beside each of them trains
    ("meta_tokens", "full")                 trains itself
    what no pattern matches                 is frozen: no gradient, no optimizer state, not in the run's checkpoints

Parameters are nested dicts; a path is their keys, joined by dots.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from flax.traverse_util import flatten_dict, unflatten_dict

from metaembed_jax.errors import UserError

ALWAYS_KNOWN = ("head.kernel",)  # a pattern may name it where the config has no head
LORA = ".lora."  # in the path of every parameter of an adapter

Table = Sequence[tuple[str, str]]


def trainable_paths(table: Table, paths: Iterable[str]) -> frozenset[str]:
    """The paths that train, of all of a network.

    Raises:
      UserError: a pattern that matches nothing, or one that makes a kernel train that carries an adapter.
    """
    paths = sorted(paths)
    adapted = {path.split(LORA)[0] + ".kernel" for path in paths if LORA in path}
    trained = {path for path in paths if LORA in path}
    for pattern, how in table:
        found = [path for path in paths if fnmatchcase(path, pattern) and LORA not in path]
        if not found and not any(fnmatchcase(path, pattern) for path in ALWAYS_KNOWN):
            raise UserError(f"config.model.trained: {pattern!r} matches none of the parameters {', '.join(paths)}")
        if how == "full" and (both := sorted(adapted.intersection(found))):
            raise UserError(f"config.model.trained: {pattern!r} trains {both[0]} in full, and another pattern gives it an adapter")
        trained.update(found if how == "full" else ())
    return frozenset(trained)


def split(parameters: dict, trained: frozenset[str]) -> tuple[dict, dict]:
    """(what trains, what is frozen), both nested dicts."""
    flat = flatten_dict(parameters, sep=".")
    parts = ({path: leaf for path, leaf in flat.items() if (path in trained) == wanted} for wanted in (True, False))
    return tuple(unflatten_dict(part, sep=".") for part in parts)


def join(*parts: dict) -> dict:
    """Nested dicts that share no path, as one; the way back from `split`."""
    return unflatten_dict({path: leaf for part in parts for path, leaf in flatten_dict(part, sep=".").items()}, sep=".")


def paths(parameters: dict) -> frozenset[str]:
    """The paths of nested dicts."""
    return frozenset(flatten_dict(parameters, sep="."))
