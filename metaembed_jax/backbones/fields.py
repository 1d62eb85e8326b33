"""Fields of a checkpoint's config.json and preprocessor_config.json, read into dataclasses with everything checked."""

import dataclasses
import math
import typing
from pathlib import Path

from metaembed_jax.errors import UserError

MOST_LAYERS = 1000  # that a config may ask for


def free(default):
    """A field of a dataclass that no parameter depends on: a run may start from another that has another value."""
    return dataclasses.field(default=default, metadata={"free": True})


def differences(ours, theirs, but_free: bool, start: str = "") -> list[tuple[str, object, object]]:
    """(name, our value, their value) of the fields in which two dataclasses of one kind differ, those of nested ones too.

    Args:
      but_free: leave out those that are `free`.
    """
    found = []
    for field in dataclasses.fields(ours):
        pair = getattr(ours, field.name), getattr(theirs, field.name)
        if dataclasses.is_dataclass(pair[0]):
            found += differences(*pair, but_free, f"{start}{field.name}.")
        elif pair[0] != pair[1] and not (but_free and field.metadata.get("free")):
            found.append((start + field.name, *pair))
    return found


def part(config: dict, key: str) -> dict:
    """The object under a key of a config.json; {} where there is none.

    Raises:
      UserError: it is something else.
    """
    found = config.get(key)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"config.json: {key} is {found!r}, not an object of keys and values")
    return found or {}


def rotary(text: dict) -> dict:
    """What a text_config says of rotary positions, with `rope_theta` (None: nothing) and `rope_type`, as transformers reads it.

    `rope_scaling` is the older name of `rope_parameters`, and counts where both are there; `rope_theta` beside it, and `type`, are
    older too, and count where it has none.

    Raises:
      UserError: it is no object.
    """
    found = part(text, "rope_scaling") or part(text, "rope_parameters")
    return {"rope_theta": text.get("rope_theta"), "rope_type": found.get("type", "default")} | found


def pick(kind: type, values: dict, name: str, title: str):
    """A dataclass from those values that are its fields; what is absent or null has its default.

    Args:
      name: of the object that the values are, for errors.
      title: of the family, for errors.

    Raises:
      UserError: a field without a default is missing, or a value cannot be a field's.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    missing = [field for field, spec in fields.items() if values.get(field) is None and spec.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{name} of a {title} config lacks {', '.join(missing)}")
    chosen = {field: values[field] for field in fields if values.get(field) is not None}
    for field, value in chosen.items():
        if not _fits(value, fields[field].type):
            raise UserError(f"{name} of a {title} config: {field} is {value!r}, which cannot be")
    return kind(**{field: tuple(value) if isinstance(value, list) else value for field, value in chosen.items()})


def require(name: str, value, known: tuple, title: str) -> None:
    """Refuses a value of a config.json that a family's checkpoints never have.

    Raises:
      UserError: names it, and what they have.
    """
    if value not in known:
        raise UserError(f"config.json: {name} is {value!r}; {title} has {known[0]!r}")


def check_depth(*layers: int) -> None:
    """Refuses stacks that no model has.

    Raises:
      UserError: names the deepest.
    """
    if (deepest := max(layers)) > MOST_LAYERS:
        raise UserError(f"config.json: {deepest} layers; at most {MOST_LAYERS} are read")


def check_heads(part: str, width: int, heads: int, multiple: int = 1) -> None:
    """Refuses states that heads cannot share evenly.

    Args:
      part: of config.json, for errors.
      multiple: of which a head's width must be one.

    Raises:
      UserError: names the sizes.
    """
    if width % (multiple * heads):
        wanted = f"{heads} heads" + (f", each a multiple of {multiple} wide" if multiple > 1 else "")
        raise UserError(f"{part}: a hidden_size of {width} cannot be split over {wanted}")


def check_key_value_heads(heads: int, key_value_heads: int) -> None:
    """Refuses attention heads that cannot share keys and values evenly.

    Raises:
      UserError: names both counts.
    """
    if heads % key_value_heads:
        raise UserError(f"text_config: {heads} attention heads cannot share {key_value_heads} key-value heads")


def initializer_range(config: dict) -> float:
    """The standard deviation of fresh rows of the vocabulary, by a config.json; 0.02 where it has none.

    Raises:
      UserError: it is no such number.
    """
    values = {**config, **part(config, "text_config")}
    found = values.get("initializer_range")
    if found is not None and not _fits(found, float):
        raise UserError(f"config.json: initializer_range is {found!r}, which cannot be")
    return 0.02 if found is None else found


def check_processing(preprocessor: dict, known: dict) -> None:
    """Refuses a preprocessor_config.json that sets one of the `known` keys to another value.

    Raises:
      UserError: names the key.
    """
    for key, value in known.items():
        if preprocessor.get(key, value) != value:
            raise UserError(f"preprocessor_config.json: {key}={preprocessor[key]!r} is not supported, only {value!r}")


def check_sizes(sizes: dict) -> None:
    """Refuses sizes of a preprocessor_config.json that are there and no positive whole numbers.

    Raises:
      UserError: names the key.
    """
    for key, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"preprocessor_config.json: {key} is {value!r}, not a positive whole number")


def normalisation(preprocessor: dict, place: Path, title: str) -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std`, as far as the preprocessor sets them.

    Args:
      place: of the preprocessor, for errors.

    Raises:
      UserError: they are no three numbers each, or pixels are scaled by something else than 1/255.
    """
    chosen = {key: preprocessor[key] for key in ("image_mean", "image_std") if preprocessor.get(key) is not None}
    for key, values in chosen.items():
        numbers = isinstance(values, list) and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        if not numbers or len(values) != 3 or (key == "image_std" and min(values) <= 0):
            raise UserError(f"{place}: the preprocessor's {key} is {values!r}, not three numbers (above zero for image_std)")
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{place}: the preprocessor's rescale_factor is {factor!r}; {title} has 1/255")
    return {key: tuple(map(float, values)) for key, values in chosen.items()}


def _fits(value, kind) -> bool:
    """Whether a value of a config.json can be a field's: strings, positive numbers, and in tuples numbers from 0."""
    if kind is str:
        return isinstance(value, str)
    if kind is int:
        return type(value) is int and 0 < value < 2**31
    if kind is float:
        return type(value) in (int, float) and 0 < value < math.inf
    kinds = (int,) if typing.get_args(kind)[0] is int else (int, float)
    return isinstance(value, list | tuple) and all(type(part) in kinds and 0 <= part < math.inf for part in value)
