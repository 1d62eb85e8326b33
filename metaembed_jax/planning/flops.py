"""FLOPs of a step in closed form: two for each multiplication and addition of its matrix products, nothing for the rest.

Linear maps come from the parameters there are, each with the rows that pass it by the `parts` of its family; attention and the
similarities of the loss have no parameters and are counted beside them. Rows of padding count, and so does what a mask hides.

Rotating heads takes products too (`layers.rotate`), which are of this implementation, not of the model.

Backward, a linear map costs its forward once for the gradient of its input, unless nothing that trains lies before it, and once for
that of its kernel, if it trains; an adapter trains always.
"""

import math
from typing import NamedTuple

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from metaembed_jax.backbones import family
from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.config import model_config
from metaembed_jax.data.slots import slots
from metaembed_jax.inputs.examples import ShapeClass
from metaembed_jax.network import abstract_network
from metaembed_jax.trained import LORA, trained_paths


class Flops(NamedTuple):
    """Of one step, over all devices.

    Attributes:
      forward, backward: what the mathematics needs.
      extra: rotations, and what the backward pass computes again instead of keeping it.
    """

    forward: float
    backward: float = 0.0
    extra: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(x + y for x, y in zip(self, other, strict=True)))

    def times(self, number: float) -> "Flops":
        """Of so many."""
        return Flops(*(number * x for x in self))

    @property
    def model(self) -> float:
        """What the mathematics needs, which is what MFU counts."""
        return self.forward + self.backward


def train_flops(config: ConfigDict) -> Flops:
    """Of a training step: both sides' encoders, and the loss."""
    counter = _Counter(config)
    multiple = model_config(config).architecture.patch_multiple
    query_budget, candidate_budget = (max(group[side] for group in config.groups) for side in (0, 1))
    pairs, negatives, width = config.batch_size, config.data.negatives, counter.width
    sides = (
        ("query_shapes", pairs, query_budget, query_budget),
        ("candidate_shapes", pairs * (1 + negatives), config.query_tokens + candidate_budget, candidate_budget),
    )
    total = Flops(0)
    for key, items, appended, read in sides:
        rows = slots(config, key, items, multiple, np.arange(config.microbatch_size))
        for shape, microbatches in zip(rows.shapes, rows.microbatches, strict=True):
            total += counter.item(shape, appended, read, is_mapped=microbatches > 1).times(microbatches * rows.size)
    similarities = 2.0 * pairs * (pairs + negatives) * query_budget * candidate_budget * width
    return total + Flops(similarities, 2 * similarities)


def encode_flops(config: ConfigDict, shape: ShapeClass, rows: int) -> Flops:
    """Of encoding candidates of one shape class at the largest budget."""
    counter = _Counter(config)
    forward = counter.item(shape, config.query_tokens + config.candidate_tokens, config.candidate_tokens, is_mapped=False).forward
    return Flops(rows * forward)


def search_flops(queries: int, query_vectors: int, candidates: int, candidate_vectors: int, width: int) -> Flops:
    """Of the similarities of every query vector to every candidate vector."""
    return Flops(2.0 * queries * query_vectors * candidates * candidate_vectors * width)


class _Counter:
    """Counts rows of a config's network."""

    def __init__(self, config: ConfigDict):
        model = model_config(config)
        self._family, self._architecture = family(model.backbone), model.architecture
        self._recomputes = config.checkpoint_layers
        self._shapes = {path: x.shape for path, x in flatten_dict(nnx.to_pure_dict(abstract_network(model)[1]), sep=".").items()}
        self._trained = trained_paths(config.trained, self._shapes)
        self.width = config.embedding_dim or model.architecture.width

    def item(self, shape: ShapeClass, appended: int, read: int, is_mapped: bool) -> Flops:
        """Of one row of a batch.

        Args:
          appended: rows of Meta Tokens behind the prompt.
          read: rows that become vectors.
          is_mapped: one of several microbatches, each of which is computed again in the backward pass.
        """
        parts = self._family.parts(self._architecture, shape.patches, shape.tokens + appended, read)
        total = Flops(0)
        for number, part in enumerate(parts):
            before = any(self._trains(one) for one in parts[:number] if one.path != part.path)
            total += self._part(part, before, appended)
        head = sum((read * self._map(path) for path in self._kernels("head")), np.zeros(2))
        total += _linear(head, passes_back=True)
        return total + Flops(0, 0, (total.forward + sum(map(_rotations, parts))) * is_mapped)

    def _trains(self, part: Part) -> bool:
        return any(_lies_in(path, f"backbone.{part.path}") for path in self._trained)

    def _part(self, part: Part, before: bool, appended: int) -> Flops:
        """Of one part; `before`: something that trains lies before its stack."""
        prefix, is_stack = f"backbone.{part.path}", bool(part.attention)
        passes_back = part.appended or before or (self._trains(part) and is_stack)  # the layers of a stack lie before each other
        maps, memory, last = np.zeros(2), np.zeros(2), 0.0
        for path in self._kernels(prefix):
            name = path.split(".")[-2]
            flops = part.other_rows.get(name, part.rows) * self._map(path, part.layers if is_stack else None)
            if name in part.memory:
                memory += flops
            else:
                maps += flops
            if part.last and path == f"{prefix}.{part.last}.kernel" and f"backbone.{part.gate}" not in self._trained:
                last = part.rows * self._outputs(path, part.layers)
        attention, rotations = sum(_attention(one, appended) for one in part.attention), _rotations(part)
        recomputed = is_stack and part.scanned and self._recomputes and passes_back
        again = float(maps[0] + memory[0]) - last + attention + rotations
        extra = rotations * (1 + passes_back) + again * recomputed
        to_keys = not part.memory or before or bool(memory[1])  # keys and values that nothing trains get no gradient
        total = _linear(maps, passes_back) + _linear(memory, before)
        return total + Flops(attention, (1 + to_keys) * attention * passes_back, extra)

    def _map(self, path: str, layers: int | None = None) -> np.ndarray:
        """[forward, gradient of the kernel] of a linear map, FLOPs a row: of so many layers of a stack, or of all there are."""
        *stack, inputs, outputs = self._shapes[path]
        layers = math.prod(stack) if layers is None else layers
        kernel, adapter = 2.0 * layers * inputs * outputs, 2.0 * layers * self._rank(path) * (inputs + outputs)
        return np.array([kernel + adapter, kernel * (path in self._trained) + adapter])

    def _outputs(self, path: str, layers: int) -> float:
        """FLOPs a row of the products that give a map's outputs: all but those into its adapter."""
        *_, inputs, outputs = self._shapes[path]
        return 2.0 * layers * outputs * (inputs + self._rank(path))

    def _rank(self, path: str) -> int:
        """Of the adapter beside a kernel; 0: none."""
        adapter = self._shapes.get(path.removesuffix(".kernel") + LORA + "a")
        return adapter[-1] if adapter else 0

    def _kernels(self, prefix: str) -> list[str]:
        return [path for path in self._shapes if _lies_in(path, prefix) and path.endswith(".kernel")]


def _lies_in(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def _attention(one: Attention, appended: int) -> float:
    """Of scores and of mixing by them, forward."""
    pairs = (one.queries - appended) ** 2 + appended * one.span if one.prefix else one.queries * one.span
    return 4.0 * one.layers * pairs * one.heads * one.head_width


def _rotations(part: Part) -> float:
    """Of queries and keys, forward."""
    turned = [one for one in part.attention if one.rotates]
    rows = [one.layers * (one.queries * one.heads + one.keys * one.key_heads) for one in turned]
    return 2.0 * sum(count * one.head_width**2 for count, one in zip(rows, turned, strict=True))


def _linear(maps: np.ndarray, passes_back: bool) -> Flops:
    forward, kernels = maps.tolist()
    return Flops(forward, forward * passes_back + kernels)
