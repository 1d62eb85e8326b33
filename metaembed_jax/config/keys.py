"""Changes of a config by dotted keys, and the flags `--config.key=value`."""

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_origin

from metaembed_jax.config.run import RunConfig
from metaembed_jax.config.section import Section, annotations, leaf_keys, plain, section_of
from metaembed_jax.errors import UserError

S = TypeVar("S", bound=Section)


def with_keys(section: S, changes: Mapping[str, object]) -> S:
    """Return a section with changed values, which are checked together.

    Args:
      changes: values by key, such as `rows.batch_size`, or in a dict `model.architecture.text_config.hidden_size`. A key of a
        section that is None sets the section, with the defaults of its other keys.

    Raises:
      UserError: an unknown key, or a value that is not allowed.
    """
    values = {name: getattr(section, name) for name in annotations(type(section))}
    for name in {key.partition(".")[0] for key in changes if "." in key}:
        if name in values and values[name] is None:
            values[name] = _value(section, name)
    return dataclasses.replace(section, **_merged(values, changes))


def _merged(values: Mapping[str, Any], changes: Mapping[str, object]) -> dict[str, Any]:
    merged, inner = {**values}, {}
    for key, value in changes.items():
        name, dot, rest = key.partition(".")
        if name not in values:
            raise UserError(f"unknown key {key!r}: expected one of {', '.join(values)}")
        if dot:
            inner.setdefault(name, {})[rest] = value
        else:
            merged[name] = value
    for name, nested in inner.items():
        node = merged[name]
        merged[name] = _merged(node, nested) if isinstance(node, dict) else with_keys(node, nested)
    return merged


def apply_flags(config: RunConfig, flags: Mapping[str, str]) -> RunConfig:
    """Return a config with the values of flags, {key: text}.

    Raises:
      UserError: an unknown key, or a value that is not allowed.
    """
    return with_keys(config, {key: _parse(config, key, text) for key, text in flags.items()})


def _parse(config: RunConfig, key: str, text: str):
    """Parse a text as a Python literal for a key. A text that is not a literal is returned unchanged; the section checks it."""
    node, annotation = config, RunConfig
    for name in key.split("."):
        if isinstance(node, dict) and name in node:
            node, annotation = node[name], type(node[name])
        elif isinstance(node, Section) and name in annotations(type(node)):
            node, annotation = _value(node, name), annotations(type(node))[name]
        else:
            raise UserError(f"--config.{key}: no such key; {_advice(key)}")
    if isinstance(node, dict):
        raise UserError(f"--config.{key}: a group of keys; set one of them, or all in the file of the config")
    if section := section_of(annotation):
        raise UserError(
            f"--config.{key}: a group of keys; expected one of {', '.join(f'{key}.{leaf}' for leaf in leaf_keys(section))}"
        )
    if plain(annotation) is str or get_origin(annotation) is Literal:
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _value(section: Section, name: str) -> Any:
    """Return a value of a section; of a section in it that is None, the defaults."""
    value, kind = getattr(section, name), section_of(annotations(type(section))[name])
    return kind() if value is None and kind else value


def _advice(key: str) -> str:
    keys, leaf = leaf_keys(RunConfig), key.rpartition(".")[2]
    if full := [other for other in keys if other.rpartition(".")[2] == leaf]:
        return f"did you mean {' or '.join(full)}?"
    if near := [other for other in keys if difflib.get_close_matches(leaf, [other.rpartition(".")[2]], cutoff=0.7)]:
        return f"nearest: {', '.join(near)}"
    groups = [f"{name}.*" if section_of(annotation) else name for name, annotation in annotations(RunConfig).items()]
    return f"expected one of {', '.join(groups)}"
