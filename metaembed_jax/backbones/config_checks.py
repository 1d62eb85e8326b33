"""Read a checkpoint's config.json and preprocessor_config.json into dataclasses, with every field checked."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

from metaembed_jax.errors import UserError

MOST_LAYERS = 1000  # of a stack


def free(default: Any) -> Any:
    """Return a field of a dataclass that no parameter depends on: a run may start from another that has another value."""
    return dataclasses.field(default=default, metadata={"free": True})


def differences(ours: Any, theirs: Any, but_free: bool, start: str = "") -> list[tuple[str, object, object]]:
    """Return (name, our value, their value) of the fields in which two dataclasses of one kind differ, nested ones included.

    Args:
      but_free: leave out those that are `free`.
    """
    different = []
    for field in dataclasses.fields(ours):
        pair = getattr(ours, field.name), getattr(theirs, field.name)
        if dataclasses.is_dataclass(pair[0]):
            different += differences(*pair, but_free, f"{start}{field.name}.")
        elif pair[0] != pair[1] and not (but_free and field.metadata.get("free")):
            different.append((start + field.name, *pair))
    return different


def section(config: dict, key: str) -> dict:
    """Return the object under a key of a config.json; {} where there is none.

    Raises:
      UserError: the value is something else.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"config.json: {key} is {value!r}; expected an object of keys and values")
    return value or {}


def rotary(text: dict) -> dict:
    """Return the rotary positions of a text_config, with `rope_theta` (None: not set) and `rope_type`, as transformers reads them.

    `rope_scaling` is the older name of `rope_parameters`, and counts where both are there; `rope_theta` next to it, and `type`, are
    older too, and count where it has none.

    Raises:
      UserError: the value is not an object.
    """
    rope = section(text, "rope_scaling") or section(text, "rope_parameters")
    return {"rope_theta": text.get("rope_theta"), "rope_type": rope.get("type", "default")} | rope


def pick(kind: Any, values: dict, name: str, title: str) -> Any:
    """Make a dataclass from those values that are its fields; what is absent or null has its default.

    Args:
      kind: the dataclass.
      name: of the object in config.json, for errors.
      title: of the family, for errors.

    Raises:
      UserError: a field without a default is missing, or has a value that its type cannot have.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    missing = [field for field, spec in fields.items() if values.get(field) is None and spec.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{name} of a {title} config lacks {', '.join(missing)}")
    present = {field: values[field] for field in fields if values.get(field) is not None}
    for field, value in present.items():
        if not _fits(value, fields[field].type):
            raise UserError(f"{name} of a {title} config: {field} is {value!r}; expected {_expected(fields[field].type)}")
    return kind(**{field: tuple(value) if isinstance(value, list) else value for field, value in present.items()})


def require(name: str, value: object, known: tuple, title: str) -> None:
    """Refuse a value of a config.json that a family's checkpoints never have.

    Raises:
      UserError: names it, and what they have.
    """
    if value not in known:
        raise UserError(f"config.json: {name} is {value!r}; {title} has {known[0]!r}")


def check_depth(*layers: int) -> None:
    """Refuse stacks that no model has.

    Raises:
      UserError: names the deepest.
    """
    if (deepest := max(layers)) > MOST_LAYERS:
        raise UserError(f"config.json: {deepest} layers; expected at most {MOST_LAYERS}")


def check_heads(name: str, width: int, heads: int, multiple: int = 1) -> None:
    """Refuse states that heads cannot share evenly.

    Args:
      name: of the object in config.json, for errors.
      multiple: the width of a head must be a multiple of it.

    Raises:
      UserError: names the sizes.
    """
    if width % (multiple * heads):
        shares = f"{heads} heads" + (f", each a multiple of {multiple} wide" if multiple > 1 else "")
        raise UserError(f"{name}: a hidden_size of {width} cannot be split over {shares}")


def check_key_value_heads(heads: int, key_value_heads: int) -> None:
    """Refuse attention heads that cannot share keys and values evenly.

    Raises:
      UserError: names both counts.
    """
    if heads % key_value_heads:
        raise UserError(f"text_config: {heads} attention heads cannot share {key_value_heads} key-value heads")


def check_ascending(name: str, numbers: tuple[int, ...], layers: int) -> None:
    """Refuse numbers of layers that are none, repeated, out of order or beyond the last layer.

    Raises:
      UserError: names them.
    """
    if not numbers or list(numbers) != sorted(set(numbers)) or numbers[-1] >= layers:
        raise UserError(f"config.json: {name} is {list(numbers)}; expected ascending numbers from 0 to {layers - 1}, at least one")


def initializer_range(config: dict) -> float:
    """Return the standard deviation of fresh rows of the vocabulary, by a config.json; 0.02 where it has none.

    Raises:
      UserError: the value is not a positive number.
    """
    value = {**config, **section(config, "text_config")}.get("initializer_range")
    if value is None:
        return 0.02
    if not _fits(value, float):
        raise UserError(f"config.json: initializer_range is {value!r}; expected {_expected(float)}")
    return value


def check_processing(preprocessor: dict, known: dict) -> None:
    """Refuse a preprocessor_config.json that sets one of the `known` keys to another value.

    Raises:
      UserError: names the key.
    """
    for key, value in known.items():
        if preprocessor.get(key, value) != value:
            raise UserError(f"preprocessor_config.json: {key}={preprocessor[key]!r} is not supported; expected {value!r}")


def check_sizes(sizes: dict) -> None:
    """Refuse sizes of a preprocessor_config.json that are there and not positive integers.

    Raises:
      UserError: names the key.
    """
    for key, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"preprocessor_config.json: {key} is {value!r}; expected a positive integer")


def normalisation(preprocessor: dict, file: Path, title: str) -> dict[str, tuple[float, ...]]:
    """Return `image_mean` and `image_std`, as far as the preprocessor sets them.

    Args:
      file: of the preprocessor, for errors.

    Raises:
      UserError: they are not three numbers each, or pixels are scaled by something else than 1/255.
    """
    pixels = {key: preprocessor[key] for key in ("image_mean", "image_std") if preprocessor.get(key) is not None}
    for key, values in pixels.items():
        are_numbers = isinstance(values, list) and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        if not are_numbers or len(values) != 3 or (key == "image_std" and min(values) <= 0):
            expected = "three positive numbers" if key == "image_std" else "three numbers"
            raise UserError(f"{file}: the preprocessor's {key} is {values!r}; expected {expected}")
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{file}: the preprocessor's rescale_factor is {factor!r}; {title} has 1/255")
    return {key: tuple(map(float, values)) for key, values in pixels.items()}


def _fits(value: object, kind: Any) -> bool:
    """Check a value of a config.json against a field's type: strings, positive numbers, and in tuples numbers from 0."""
    if kind is str:
        return isinstance(value, str)
    if kind is int:
        return type(value) is int and 0 < value < 2**31
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf
    kinds = (int,) if typing.get_args(kind)[0] is int else (int, float)
    return isinstance(value, list | tuple) and all(type(number) in kinds and 0 <= number < math.inf for number in value)


def _expected(kind: Any) -> str:
    """Describe the values that `_fits` accepts."""
    numbers = {str: "a string", int: "a positive integer", float: "a positive number"}
    if kind in numbers:
        return numbers[kind]
    return f"a list of {'integers' if typing.get_args(kind)[0] is int else 'numbers'} of 0 or more"
