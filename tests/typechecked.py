"""The checker that the suite runs the package under: shapes and types of arrays, as jaxtyping has them in the annotations.

Other annotations are for pyright. At run time a test's stand-in for a model, or an abstract mesh for a mesh, is right.
"""

import types
import typing
from collections.abc import Callable

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable) -> Callable:
    """Wrap a function by checks of its arrays."""
    annotations = function.__annotations__
    if function.__name__ == "__init__":  # of a dataclass, which as a tree holds anything: shardings, shapes, None
        return function
    function.__annotations__ = {name: _on_any_device(hint) for name, hint in annotations.items() if _has_shape(hint)}
    try:
        return beartype(function)
    finally:
        function.__annotations__ = annotations


def _has_shape(hint) -> bool:
    return _is_shape(hint) or any(map(_has_shape, typing.get_args(hint)))


def _is_shape(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _on_any_device(hint):
    """Allow NumPy's arrays where JAX's are annotated: JAX's functions take both."""
    if _is_shape(hint):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str] if hint.array_type is jax.Array else hint
    parts = typing.get_args(hint)
    if not any(map(_has_shape, parts)):
        return hint
    parts = tuple(map(_on_any_device, parts))
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.Union[parts] if is_union else typing.get_origin(hint)[parts]  # noqa: UP007
