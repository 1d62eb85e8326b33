"""Floating-point operations of a JAX function, counted in its jaxpr: matrix products only, loops multiplied out."""

import math
import operator
from collections.abc import Callable, Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr


def traced_flops(function: Callable, *arguments, branches: Sequence[float] = ()) -> float:
    """Return the FLOPs of all matrix products in a call of a jitted function: two for each multiplication and addition.

    Args:
      branches: the share of runs of each branch of a conditional. In conditionals with another number of branches, the branch with
        the most FLOPs is counted.
    """
    return _count(function.trace(*arguments).jaxpr.jaxpr, branches)


def _count(jaxpr: Jaxpr, branches: Sequence[float]) -> float:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * width
        inner = [_count(body, branches) for body in _bodies(equation.params)]
        if equation.primitive.name == "cond":
            is_chosen = len(inner) == len(branches) and not equation.params.get("branches_platforms")
            total += sum(map(operator.mul, inner, branches)) if is_chosen else max(inner, default=0)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _bodies(parameters: dict) -> list[Jaxpr]:
    bodies = []
    for value in parameters.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if isinstance(body, ClosedJaxpr):
                bodies.append(body.jaxpr)
            elif isinstance(body, Jaxpr):
                bodies.append(body)
    return bodies
