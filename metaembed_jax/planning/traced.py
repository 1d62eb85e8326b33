"""The largest arrays of a traced program, for a program that the compiler refuses."""

from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr

from metaembed_jax.planning.cost import LARGEST, CostItem

FREE = ("broadcast_in_dim", "jit")  # make no new arrays


def largest_arrays(jaxpr: ClosedJaxpr) -> list[CostItem]:
    """Return the largest arrays over all devices, one of each size. The compiler may split them, or never make them."""
    largest: dict[int, CostItem] = {}
    for size, shape, name in _arrays(jaxpr.jaxpr, ""):
        largest.setdefault(size, CostItem(size, shape, 1, name))
    return sorted(largest.values(), reverse=True)[:LARGEST]


def _arrays(jaxpr: Jaxpr, scope: str) -> Iterator[tuple[int, str, str]]:
    """Yield (bytes, type and sizes, name of the operation) of all results, also inside loops."""
    for equation in jaxpr.eqns:
        inner_scope = "/".join(name for name in (scope, str(equation.source_info.name_stack)) if name)
        for variable in equation.outvars if equation.primitive.name not in FREE else ():
            if size := _array_bytes(variable.aval):
                yield size, variable.aval.str_short(), f"{inner_scope}/{equation.primitive.name}"
        for value in equation.params.values():
            for body in value if isinstance(value, tuple | list) else (value,):
                body = body.jaxpr if isinstance(body, ClosedJaxpr) else body
                if isinstance(body, Jaxpr):
                    yield from _arrays(body, inner_scope)


def _array_bytes(value) -> int:
    """Return the bytes of an abstract array; 0 for other values, such as tokens."""
    return value.size * value.dtype.itemsize if hasattr(value, "dtype") and hasattr(value.dtype, "itemsize") else 0
