"""Products of a lowered program that have float32 factors, and those that a chip would round."""

import re
from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

_PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution|dot)\b.*")


def products(text: str) -> list[str]:
    """Return the products of a StableHLO text that have a float32 factor."""
    return [line for line in _PRODUCT.findall(text) if "f32>" in line.rpartition(" : ")[2].partition("->")[0]]


def rounded(text: str) -> list[str]:
    """Return the products that do not ask for the highest precision."""
    return [line for line in products(text) if line.count("HIGHEST") < 2]


def rounded_in_kernels(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Return the same for Pallas kernels in a jaxpr; StableHLO has them only as bytes."""
    highest = (jax.lax.Precision.HIGHEST,) * 2
    return [
        product
        for kernel in equations(jaxpr)
        if kernel.primitive.name == "pallas_call"
        for product in equations(kernel.params["jaxpr"])
        if product.primitive.name == "dot_general" and product.params["precision"] != highest
        if any(factor.aval.dtype == "float32" for factor in product.invars)
    ]


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the equations of a jaxpr, including those of loops, branches and kernels."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                body = part.jaxpr if isinstance(part, ClosedJaxpr) else part
                if isinstance(body, Jaxpr):
                    yield from equations(body)
