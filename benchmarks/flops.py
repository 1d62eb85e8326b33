"""Floating-point operations of a JAX function, counted in its jaxpr: matrix products only, loops multiplied out."""

import math
from collections.abc import Callable

from jax.extend.core import ClosedJaxpr, Jaxpr


def traced_flops(function: Callable, *arguments) -> int:
    """FLOPs of all matrix products of one call of a jitted function: two for each multiplication and addition."""
    return _count(function.trace(*arguments).jaxpr.jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * width
        inner = [_count(body) for body in _bodies(equation.params)]
        if equation.primitive.name == "cond":  # one branch runs: the dearest is counted
            total += max(inner, default=0)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _bodies(parameters: dict) -> list[Jaxpr]:
    found = []
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                found.append(part)
    return found
