"""FLOPs of a step in closed form: two for each multiplication and addition of its matrix products, none for anything else.

The linear maps of a network are read from its parameters. The family's `flop_counts` give the positions that pass each of them, and
the attention. The objectives count their similarities. Padding counts, and so does attention that segments mask.

Rotary embeddings and the placing of Meta Tokens use matrix products too (`layers.rotate`, `layers.embed_tokens`). They count as
extra, because they belong to this implementation and not to the model.

In the backward pass, a linear map costs its forward FLOPs once for the gradient of its input, unless nothing before it trains, and
once for the gradient of its kernel, if it trains. An adapter always trains.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from metaembed_jax.backbones.family import family
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.batch.items import Size
from metaembed_jax.batch.training import StepShape
from metaembed_jax.config.run import RunConfig
from metaembed_jax.network import ModelConfig, abstract_network
from metaembed_jax.network_config import model_config
from metaembed_jax.trainable import LORA, trainable_paths


class Flops(NamedTuple):
    """FLOPs over all devices.

    Attributes:
      forward, backward: FLOPs of the model in each pass.
      extra: rotations, the placing of Meta Tokens, and recomputation in the backward pass.
    """

    forward: float
    backward: float = 0.0
    extra: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(x + y for x, y in zip(self, other, strict=True)))

    def times(self, number: float) -> "Flops":
        """Return a multiple of all three."""
        return Flops(*(number * x for x in self))

    @property
    def model(self) -> float:
        """FLOPs of the model, as MFU counts them."""
        return self.forward + self.backward


def train_flops(config: RunConfig, shape: StepShape) -> Flops:
    """Count a training step: encoding of all rows, and the objectives."""
    counter = _NetworkFlops(config)
    recomputes_row = config.rows.recompute in ("everything", "microbatches") and shape.microbatches > 1
    rows = counter.row(shape.row, recomputes_row).times(shape.rows)
    pairs, documents = config.rows.batch_size, config.rows.batch_size + config.data.negatives
    losses = config.objectives.flops(pairs, documents, counter.width)
    return rows + Flops(losses, 2 * losses)


def encode_flops(config: RunConfig, row: Size, rows: int) -> Flops:
    """Count the encoding of rows."""
    return Flops(rows * _NetworkFlops(config).row(row, recomputes_row=False).forward)


def search_flops(queries: int, query_vectors: int, documents: int, document_vectors: int, width: int) -> Flops:
    """Count the similarities of all query vectors and all document vectors."""
    return Flops(2.0 * queries * query_vectors * documents * document_vectors * width)


class _NetworkFlops:
    """FLOPs of the network of a config."""

    def __init__(self, config: RunConfig):
        model = model_config(config)
        self._family, self._architecture = family(model.backbone), model.architecture
        self._recomputes_layers = model.checkpoint
        self._shapes = _parameter_shapes(model)
        self._trained = trainable_paths(config.model.trained, self._shapes)
        self.width = config.model.embedding_dim or model.architecture.width

    def row(self, row: Size, recomputes_row: bool) -> Flops:
        """Count one packed row.

        Args:
          recomputes_row: the backward pass starts with the whole forward pass again.
        """
        counts = self._family.flop_counts(self._architecture, row)
        total = Flops(0)
        for number, count in enumerate(counts):
            trains_before = any(self._trains(other) for other in counts[:number] if other.path != count.path)
            total += self._entry(count, trains_before)
        head = sum((row.vectors * self._map(path) for path in self._kernels("head")), np.zeros(2))
        total += _linear(head, has_input_gradient=True)
        placing = 2.0 * row.tokens * math.prod(self._shapes.get("meta_tokens", (0,)))
        extra = placing + sum(map(_rotations, counts))
        recomputed = (total.forward + extra) * recomputes_row
        return total + Flops(0, 0, placing * (1 + ("meta_tokens" in self._trained)) + recomputed)

    def _trains(self, count: FlopCount) -> bool:
        return any(_is_inside(path, f"backbone.{count.path}") for path in self._trained)

    def _entry(self, count: FlopCount, trains_before: bool) -> Flops:
        """Count one entry of `flop_counts`.

        Args:
          trains_before: something that trains is before the entry's stack.
        """
        prefix, is_stack = f"backbone.{count.path}", bool(count.attention)
        # The layers of a stack come before each other.
        has_input_gradient = count.has_meta or trains_before or (self._trains(count) and is_stack)
        maps, memory, last = np.zeros(2), np.zeros(2), 0.0
        for path in self._kernels(prefix):
            name = path.split(".")[-2]
            flops = count.other_positions.get(name, count.positions) * self._map(path, count.layers if is_stack else None)
            if name in count.memory:
                memory += flops
            else:
                maps += flops
            if count.last and path == f"{prefix}.{count.last}.kernel" and f"backbone.{count.gate}" not in self._trained:
                last = count.positions * self._outputs(path, count.layers)
        attention, rotations = sum(map(_attention, count.attention)), _rotations(count)
        is_recomputed = is_stack and count.scanned and self._recomputes_layers and has_input_gradient
        recomputed = float(maps[0] + memory[0]) - last + attention + rotations
        extra = rotations * (1 + has_input_gradient) + recomputed * is_recomputed
        has_key_gradient = not count.memory or trains_before or bool(memory[1])
        total = _linear(maps, has_input_gradient) + _linear(memory, trains_before)
        return total + Flops(attention, (1 + has_key_gradient) * attention * has_input_gradient, extra)

    def _map(self, path: str, layers: int | None = None) -> np.ndarray:
        """Return [forward, gradient of the kernel] of a linear map, FLOPs a position; of all layers of a stack by default."""
        *stack, inputs, outputs = self._shapes[path]
        layers = math.prod(stack) if layers is None else layers
        kernel, adapter = 2.0 * layers * inputs * outputs, 2.0 * layers * self._rank(path) * (inputs + outputs)
        return np.array([kernel + adapter, kernel * (path in self._trained) + adapter])

    def _outputs(self, path: str, layers: int) -> float:
        """Return the FLOPs a position of a linear map without the first product of its adapter."""
        *_, inputs, outputs = self._shapes[path]
        return 2.0 * layers * outputs * (inputs + self._rank(path))

    def _rank(self, path: str) -> int:
        """Return the rank of a kernel's adapter; 0 without one."""
        adapter = self._shapes.get(path.removesuffix(".kernel") + LORA + "a")
        return adapter[-1] if adapter else 0

    def _kernels(self, prefix: str) -> list[str]:
        return [path for path in self._shapes if _is_inside(path, prefix) and path.endswith(".kernel")]


def _parameter_shapes(model: ModelConfig) -> dict:
    """Return the shapes of all parameters by path."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(abstract_network(model)[1]))
    return flatten_dict(shapes, sep=".")


def _is_inside(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def _attention(count: AttentionCount) -> float:
    """Count the scores and the weighted sums of the forward pass."""
    return 4.0 * count.layers * count.queries * count.span * count.heads * count.head_width


def _rotations(count: FlopCount) -> float:
    """Count the rotations of queries and keys of the forward pass."""
    rotating = [attention for attention in count.attention if attention.rotates]
    heads = [kind.layers * (kind.queries * kind.heads + kind.keys * kind.key_heads) for kind in rotating]
    return 2.0 * sum(number * kind.head_width**2 for number, kind in zip(heads, rotating, strict=True))


def _linear(maps: np.ndarray, has_input_gradient: bool) -> Flops:
    forward, kernels = maps.tolist()
    return Flops(forward, forward * has_input_gradient + kernels)
