"""Groups of config keys: frozen dataclasses whose values are checked against their annotations where they are made."""

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from metaembed_jax.errors import UserError


class Rule(NamedTuple):
    """A rule for a number, the second part of an `Annotated`.

    Attributes:
      words: the numbers it allows, for errors.
      allows: `(number) -> bool`.
    """

    words: str
    allows: Callable[[float], bool]


Positive = Annotated[int, Rule("a positive integer", lambda number: number > 0)]
NonNegative = Annotated[int, Rule("a non-negative integer", lambda number: number >= 0)]
PositiveNumber = Annotated[float, Rule("a positive number", lambda number: number > 0)]
NonNegativeNumber = Annotated[float, Rule("a non-negative number", lambda number: number >= 0)]
Share = Annotated[float, Rule("a number from 0 to below 1", lambda number: 0 <= number < 1)]

WORDS = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false", dict: "keys with values"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the dataclasses, annotated with keys of `WORDS`, numbers with a `Rule`, literals, tuples, unions or sections.

    Attributes:
      KEY: the name of the group, as in flags and errors.
    """

    KEY: ClassVar[str] = "config"

    def __post_init__(self):
        for name, annotation in annotations(type(self)).items():
            value = getattr(self, name)
            if plain(annotation) is float and type(value) is int:
                value = float(value) if abs(value) < 2**1000 else math.inf
                object.__setattr__(self, name, value)
            if misfit := _misfit(value, annotation):
                index, part, expected = misfit
                raise UserError(f"{self.KEY}.{name}{index}={part!r}: expected {expected}")


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """Return the annotation of each field of a section, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def plain(annotation) -> Any:
    """Return an annotation without its rule."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def section_of(annotation) -> type[Section] | None:
    """Return the section that a field holds, which may be None in its place; None for all other fields."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def leaf_keys(kind: type[Section]) -> list[str]:
    """Return the keys of a section and of those in it, without sections themselves, as in `rows.batch_size`."""
    keys = []
    for name, annotation in annotations(kind).items():
        inner = section_of(annotation)
        keys += [f"{name}.{key}" for key in leaf_keys(inner)] if inner else [name]
    return keys


def _misfit(value, annotation) -> tuple[str, object, str] | None:
    """Return (index, value, expected) of the first entry of a value that does not fit an annotation; None where all fit."""
    entries = get_args(annotation)
    if get_origin(annotation) is tuple and entries[-1:] == (...,) and isinstance(value, tuple):
        misfits = ((number, _misfit(entry, entries[0])) for number, entry in enumerate(value))
        return next(((f"[{number}]{misfit[0]}", *misfit[1:]) for number, misfit in misfits if misfit), None)
    return None if _fits(value, annotation) else ("", value, _words(annotation))


def _fits(value, annotation) -> bool:
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return _fits(value, parts[0]) and parts[1].allows(value)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is tuple and parts[-1:] != (...,):
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(entry, parts[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _words(annotation) -> str:
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return parts[1].words
    if kind is Literal:
        return " or ".join(map(repr, parts))
    if kind in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if kind is tuple and parts[-1:] == (...,):
        return f"a tuple of {_words(parts[0])}"
    if kind is tuple:
        return f"({', '.join(map(_words, parts))})"
    return WORDS.get(kind) or f"a {kind.__name__}"
