"""FLOPs of a step in closed form: two for each multiplication and addition of its matrix products, nothing for the rest.

Linear maps come from the parameters there are, each with the positions that pass it by the `parts` of its family; attention and the
similarities of the loss have no parameters and are counted beside them. Padding counts, and so does what segments hide.

Rotating heads and placing Meta Tokens take products too (`layers.rotate`, `layers.embed_tokens`), which are of this implementation,
not of the model.

Backward, a linear map costs its forward once for the gradient of its input, unless nothing that trains lies before it, and once for
that of its kernel, if it trains; an adapter trains always.
"""

import math
from typing import NamedTuple

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from metaembed_jax.backbones.family import family
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.training import StepShape
from metaembed_jax.config.run import RunConfig
from metaembed_jax.network import abstract_network
from metaembed_jax.network_config import model_config
from metaembed_jax.trainable import LORA, trainable_paths


class Flops(NamedTuple):
    """Of one step, over all devices.

    Attributes:
      forward, backward: what the mathematics needs.
      extra: rotations, placing Meta Tokens, and what the backward pass computes again instead of keeping it.
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


def train_flops(config: RunConfig, shape: StepShape) -> Flops:
    """Count a training step on rows of this shape: their encoding, and the loss."""
    counter = _Counter(config)
    is_again = config.rows.recompute in ("everything", "microbatches") and shape.microbatches > 1
    rows = counter.row(shape.row, is_again).times(shape.rows)
    pairs, documents = config.rows.batch_size, config.rows.batch_size + config.data.negatives
    losses = config.objectives.flops(pairs, documents, counter.width)
    return rows + Flops(losses, 2 * losses)


def encode_flops(config: RunConfig, row: Size, rows: int) -> Flops:
    """Count the encoding of rows."""
    counted = _Counter(config).row(row, is_again=False)
    return Flops(rows * counted.forward)


def search_flops(queries: int, query_vectors: int, documents: int, document_vectors: int, width: int) -> Flops:
    """Similarities of every query vector to every document vector."""
    return Flops(2.0 * queries * query_vectors * documents * document_vectors * width)


class _Counter:
    """Counts what a config's network does."""

    def __init__(self, config: RunConfig):
        model = model_config(config)
        self._family, self._architecture = family(model.backbone), model.architecture
        self._recomputes = model.checkpoint
        self._shapes = {path: x.shape for path, x in flatten_dict(nnx.to_pure_dict(abstract_network(model)[1]), sep=".").items()}
        self._trained = trainable_paths(config.model.trained, self._shapes)
        self.width = config.model.embedding_dim or model.architecture.width

    def row(self, row: Size, is_again: bool) -> Flops:
        """Count one packed row.

        Args:
          is_again: the backward pass first computes the whole forward pass again.
        """
        parts = self._family.flop_counts(self._architecture, row)
        total = Flops(0)
        for number, part in enumerate(parts):
            before = any(self._trains(other) for other in parts[:number] if other.path != part.path)
            total += self._part(part, before)
        head = sum((row.vectors * self._map(path) for path in self._kernels("head")), np.zeros(2))
        total += _linear(head, passes_back=True)
        meta = 2.0 * row.tokens * math.prod(self._shapes["meta_tokens"])
        own = meta + sum(map(_rotations, parts))
        return total + Flops(0, 0, meta * (1 + ("meta_tokens" in self._trained)) + (total.forward + own) * is_again)

    def _trains(self, part: FlopCount) -> bool:
        return any(_lies_in(path, f"backbone.{part.path}") for path in self._trained)

    def _part(self, part: FlopCount, before: bool) -> Flops:
        """Of one part; `before`: something that trains lies before its stack."""
        prefix, is_stack = f"backbone.{part.path}", bool(part.attention)
        passes_back = part.has_meta or before or (self._trains(part) and is_stack)  # the layers of a stack lie before each other
        maps, memory, last = np.zeros(2), np.zeros(2), 0.0
        for path in self._kernels(prefix):
            name = path.split(".")[-2]
            flops = part.other_positions.get(name, part.positions) * self._map(path, part.layers if is_stack else None)
            if name in part.memory:
                memory += flops
            else:
                maps += flops
            if part.last and path == f"{prefix}.{part.last}.kernel" and f"backbone.{part.gate}" not in self._trained:
                last = part.positions * self._outputs(path, part.layers)
        attention, rotations = sum(map(_attention, part.attention)), _rotations(part)
        recomputed = is_stack and part.scanned and self._recomputes and passes_back
        again = float(maps[0] + memory[0]) - last + attention + rotations
        extra = rotations * (1 + passes_back) + again * recomputed
        to_keys = not part.memory or before or bool(memory[1])  # keys and values that nothing trains get no gradient
        total = _linear(maps, passes_back) + _linear(memory, before)
        return total + Flops(attention, (1 + to_keys) * attention * passes_back, extra)

    def _map(self, path: str, layers: int | None = None) -> np.ndarray:
        """[forward, gradient of the kernel] of a linear map, FLOPs a position: of so many layers of a stack, or of all."""
        *stack, inputs, outputs = self._shapes[path]
        layers = math.prod(stack) if layers is None else layers
        kernel, adapter = 2.0 * layers * inputs * outputs, 2.0 * layers * self._rank(path) * (inputs + outputs)
        return np.array([kernel + adapter, kernel * (path in self._trained) + adapter])

    def _outputs(self, path: str, layers: int) -> float:
        """FLOPs a position of the products that give a map's outputs: all but those into its adapter."""
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


def _attention(one: AttentionCount) -> float:
    """Of scores and of mixing by them, forward."""
    return 4.0 * one.layers * one.queries * one.span * one.heads * one.head_width


def _rotations(part: FlopCount) -> float:
    """Of queries and keys, forward."""
    turned = [one for one in part.attention if one.rotates]
    heads = [one.layers * (one.queries * one.heads + one.keys * one.key_heads) for one in turned]
    return 2.0 * sum(count * one.head_width**2 for count, one in zip(heads, turned, strict=True))


def _linear(maps: np.ndarray, passes_back: bool) -> Flops:
    forward, kernels = maps.tolist()
    return Flops(forward, forward * passes_back + kernels)
