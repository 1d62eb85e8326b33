"""The largest arrays of a traced program, for when there is no compiled one to look into."""

from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr

from metaembed_jax.planning.cost import LARGEST, Item

FREE = ("broadcast_in_dim", "jit")  # never an array of their own


def largest_arrays(jaxpr: ClosedJaxpr) -> list[Item]:
    """One of each size, over all devices. The compiler may split them, or never make them."""
    found: dict[int, Item] = {}
    for size, what, name in _arrays(jaxpr.jaxpr, ""):
        found.setdefault(size, Item(size, what, 1, name))
    return sorted(found.values(), reverse=True)[:LARGEST]


def _arrays(jaxpr: Jaxpr, above: str) -> Iterator[tuple[int, str, str]]:
    """(bytes, type and sizes, where it comes from) of the results of all operations, those of loops' bodies included."""
    for equation in jaxpr.eqns:
        here = "/".join(part for part in (above, str(equation.source_info.name_stack)) if part)
        for variable in equation.outvars if equation.primitive.name not in FREE else ():
            if hasattr(variable.aval, "dtype") and hasattr(variable.aval.dtype, "itemsize"):
                size = variable.aval.size * variable.aval.dtype.itemsize
                yield size, variable.aval.str_short(), f"{here}/{equation.primitive.name}"
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                body = part.jaxpr if isinstance(part, ClosedJaxpr) else part
                if isinstance(body, Jaxpr):
                    yield from _arrays(body, here)
