"""Groups of config keys: frozen dataclasses that check their values against their annotations."""

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from metaembed_jax.errors import UserError, shortened


class Rule(NamedTuple):
    """A rule for a number, the second argument of an `Annotated`.

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

LARGEST_NUMBER = 2**1000  # a float holds it, and is finite
WORDS = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false", dict: "keys with values"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the dataclasses. Fields may be of the types in `WORDS`, numbers with a `Rule`, literals, tuples, unions or sections.

    Attributes:
      KEY: the name of the group in flags and errors.
    """

    KEY: ClassVar[str] = "config"

    def __post_init__(self):
        for name, annotation in annotations(type(self)).items():
            value = getattr(self, name)
            if plain(annotation) is float and type(value) is int:
                value = float(value) if abs(value) < LARGEST_NUMBER else math.inf
                object.__setattr__(self, name, value)
            if misfit := _misfit(value, annotation):
                index, entry, expected = misfit
                raise UserError(f"{self.KEY}.{name}{index}={shortened(entry)}: expected {expected}")


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """Return the annotation of each field of a section, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def plain(annotation) -> Any:
    """Return an annotation without its rule."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def section_of(annotation) -> type[Section] | None:
    """Return the section type of a field that holds a section, or a section or None; return None for other fields."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def leaf_keys(kind: type[Section]) -> list[str]:
    """Return the keys of all values in a section, such as `rows.batch_size`."""
    keys = []
    for name, annotation in annotations(kind).items():
        inner = section_of(annotation)
        keys += [f"{name}.{key}" for key in leaf_keys(inner)] if inner else [name]
    return keys


def _misfit(value, annotation) -> tuple[str, object, str] | None:
    """Return (index, entry, expected) of the first entry of a value that does not fit an annotation; None if all fit."""
    entries = get_args(annotation)
    if get_origin(annotation) is tuple and entries[-1:] == (...,) and isinstance(value, tuple):
        misfits = ((number, _misfit(entry, entries[0])) for number, entry in enumerate(value))
        return next(((f"[{number}]{misfit[0]}", *misfit[1:]) for number, misfit in misfits if misfit), None)
    return None if _fits(value, annotation) else ("", value, _words(annotation))


def _fits(value, annotation) -> bool:
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return _fits(value, arguments[0]) and arguments[1].allows(value)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if kind is tuple and arguments[-1:] != (...,):
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(entry, arguments[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < LARGEST_NUMBER
    return type(value) is kind


def _words(annotation) -> str:
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return arguments[1].words
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind in (Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if kind is tuple and arguments[-1:] == (...,):
        return f"a tuple of {_words(arguments[0])}"
    if kind is tuple:
        return f"({', '.join(map(_words, arguments))})"
    return WORDS.get(kind) or f"a {kind.__name__}"
