"""Reading of config.json and preprocessor_config.json into dataclasses, and checks of their fields."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

from metaembed_jax.errors import UserError, shortened

MOST_LAYERS = 1000  # of a stack


def free(default: Any) -> Any:
    """Return a dataclass field that no parameter depends on: a run may start from a run with another value."""
    return dataclasses.field(default=default, metadata={"free": True})


def differences(ours: Any, theirs: Any, but_free: bool, start: str = "") -> list[tuple[str, object, object]]:
    """Return (name, our value, their value) of the fields in which two dataclasses of one type differ, including nested ones.

    Args:
      but_free: skip fields that are `free`.
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
    """Return the object under a key of a config.json; {} if the key is absent or null.

    Raises:
      UserError: the value is not an object.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"config.json: {key} is {shortened(value)}; expected an object of keys and values")
    return value or {}


def rotary(text: dict) -> dict:
    """Return the rotary parameters of a text_config as transformers reads them, with `rope_theta` (None: not set) and `rope_type`.

    `rope_scaling` is the older name of `rope_parameters`, and has precedence. `rope_theta` next to it, and `type`, are older too,
    and are read if the object lacks them.

    Raises:
      UserError: the value is not an object.
    """
    rope = section(text, "rope_scaling") or section(text, "rope_parameters")
    return {"rope_theta": text.get("rope_theta"), "rope_type": rope.get("type", "default")} | rope


def pick(kind: Any, values: dict, name: str, title: str) -> Any:
    """Create a dataclass from the values of its fields; a field that is absent has its default.

    Args:
      kind: the dataclass.
      name: name of the object in config.json, for errors.
      title: name of the family, for errors.

    Raises:
      UserError: a field has a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    present = {field: values[field] for field in fields if field in values}
    for field, value in present.items():
        if not _fits(value, fields[field].type):
            raise UserError(f"{name} of a {title} config: {field} is {shortened(value)}; expected {_expected(fields[field].type)}")
    return kind(**{field: tuple(value) if isinstance(value, list) else value for field, value in present.items()})


def without_null(values: dict, *keys: str) -> dict:
    """Return the values of a config.json without those of `keys` that are null, which means unset."""
    return {key: value for key, value in values.items() if value is not None or key not in keys}


def require(name: str, value: object, known: tuple, title: str) -> None:
    """Check that a value of a config.json is one that checkpoints of the family have.

    Raises:
      UserError: it is not.
    """
    if value not in known:
        raise UserError(f"config.json: {name} is {shortened(value)}; {title} has {known[0]!r}")


def check_depth(*layers: int) -> None:
    """Check that stacks have at most `MOST_LAYERS` layers.

    Raises:
      UserError: one has more.
    """
    if (deepest := max(layers)) > MOST_LAYERS:
        raise UserError(f"config.json: {deepest} layers; expected at most {MOST_LAYERS}")


def check_heads(name: str, width: int, heads: int, multiple: int = 1) -> None:
    """Check that heads divide the width of states.

    Args:
      name: name of the object in config.json, for errors.
      multiple: the width of a head must be a multiple of this.

    Raises:
      UserError: they do not.
    """
    if width % (multiple * heads):
        shares = f"{heads} heads" + (f", each a multiple of {multiple} wide" if multiple > 1 else "")
        raise UserError(f"{name}: a hidden_size of {width} cannot be split over {shares}")


def check_key_value_heads(heads: int, key_value_heads: int) -> None:
    """Check that the number of attention heads is a multiple of the number of key-value heads.

    Raises:
      UserError: it is not.
    """
    if heads % key_value_heads:
        raise UserError(f"text_config: {heads} attention heads cannot share {key_value_heads} key-value heads")


def check_ascending(name: str, numbers: tuple[int, ...], layers: int) -> None:
    """Check that indices of layers ascend, are in the stack, and are at least one.

    Raises:
      UserError: they are not.
    """
    if not numbers or list(numbers) != sorted(set(numbers)) or numbers[-1] >= layers:
        raise UserError(f"config.json: {name} is {list(numbers)}; expected ascending numbers from 0 to {layers - 1}, at least one")


def initializer_range(config: dict) -> float:
    """Return the standard deviation of fresh rows of the vocabulary, from a config.json; 0.02 if it has none.

    Raises:
      UserError: the value is not a positive number.
    """
    value = {**config, **section(config, "text_config")}.get("initializer_range")
    if value is None:
        return 0.02
    if not _fits(value, float):
        raise UserError(f"config.json: initializer_range is {shortened(value)}; expected {_expected(float)}")
    return value


def check_processing(preprocessor: dict, known: dict) -> None:
    """Check that a preprocessor_config.json does not set one of the `known` keys to another value.

    Raises:
      UserError: it does.
    """
    for key, value in known.items():
        if preprocessor.get(key, value) != value:
            raise UserError(f"preprocessor_config.json: {key}={shortened(preprocessor[key])} is not supported; expected {value!r}")


def check_sizes(sizes: dict) -> None:
    """Check that sizes of a preprocessor_config.json are positive integers or None.

    Raises:
      UserError: one is something else.
    """
    for key, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"preprocessor_config.json: {key} is {shortened(value)}; expected a positive integer")


def normalisation(preprocessor: dict, file: Path, title: str) -> dict[str, tuple[float, ...]]:
    """Return `image_mean` and `image_std` of a preprocessor_config.json, those that it sets.

    Args:
      file: path of the preprocessor_config.json, for errors.

    Raises:
      UserError: they are not three numbers each, or pixels are not scaled by 1/255.
    """
    pixels = {key: preprocessor[key] for key in ("image_mean", "image_std") if preprocessor.get(key) is not None}
    for key, values in pixels.items():
        are_numbers = isinstance(values, list) and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        if not are_numbers or len(values) != 3 or (key == "image_std" and min(values) <= 0):
            expected = "three positive numbers" if key == "image_std" else "three numbers"
            raise UserError(f"{file}: the preprocessor's {key} is {shortened(values)}; expected {expected}")
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{file}: the preprocessor's rescale_factor is {shortened(factor)}; {title} has 1/255")
    return {key: tuple(map(float, values)) for key, values in pixels.items()}


def _fits(value: object, kind: Any) -> bool:
    """Check a value of a config.json against the type of a field: strings, positive numbers, and tuples of numbers of 0 or more."""
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
