"""FLOPs of a step in closed form: two for each multiplication and addition of its matrix products, nothing for the rest.

Linear maps come from the parameters there are, each with the rows that pass it; attention and the similarities of the loss have no
parameters and are counted beside them. Rows of padding count, and so does the half of causal attention that a mask hides.

Rotating heads takes products too (`layers.rotate`), which are of this implementation, not of the model.

Backward, a linear map costs its forward once for the gradient of its input, unless nothing that trains lies before it, and once for
that of its kernel, if it trains; an adapter trains always.

P patches, W patches of a window, S tokens, R rows read from the last layer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from metaembed_jax.backbones.qwen2_5_vl import FEW_LAYERS
from metaembed_jax.config import model_config
from metaembed_jax.data.prompts import ShapeClass
from metaembed_jax.data.slots import slots
from metaembed_jax.network import abstract_network
from metaembed_jax.trained import LORA, trained_paths

VISION = "backbone.vision."
# The order of data through the network: what trains in one part makes every later part pass gradients back.
PARTS = tuple(VISION + part for part in ("patch_embedding", "blocks", "merger_norm", "merger_up", "merger_down"))
LANGUAGE = "backbone.layers"


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
    vision = model_config(config).architecture.vision_config
    query_budget, candidate_budget = (max(group[side] for group in config.groups) for side in (0, 1))
    pairs, negatives, width = config.batch_size, config.data.negatives, counter.width
    sides = (
        ("query_shapes", pairs, query_budget, query_budget),
        ("candidate_shapes", pairs * (1 + negatives), config.query_tokens + candidate_budget, candidate_budget),
    )
    total = Flops(0)
    for key, items, appended, read in sides:
        rows = slots(config, key, items, vision.window_patches, np.arange(config.microbatch_size))
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
        self._text, self._vision = model.architecture.text_config, model.architecture.vision_config
        self._recomputes = config.checkpoint_layers
        self._shapes = {path: x.shape for path, x in flatten_dict(nnx.to_pure_dict(abstract_network(model)[1]), sep=".").items()}
        self._trained = trained_paths(config.trained, self._shapes)
        self.width = config.embedding_dim or self._text.hidden_size

    def item(self, shape: ShapeClass, appended: int, read: int, is_mapped: bool) -> Flops:
        """Of one row of a batch.

        Args:
          appended: rows of Meta Tokens behind the prompt.
          read: rows that become vectors.
          is_mapped: one of several microbatches, each of which is computed again in the backward pass.
        """
        total = self._images(shape.patches) if shape.patches else Flops(0)
        total += self._language(shape.tokens + appended, read) + _linear(read * self._maps("head"), passes_back=True)
        rotations = self._vision_rotations(shape.patches) + self._language_rotations(shape.tokens + appended, read)
        return total + Flops(0, 0, (total.forward + rotations) * is_mapped)

    def _images(self, P: int) -> Flops:
        total, before = Flops(0), False  # whether something that trains lies before a part
        units, in_blocks = P / self._vision.spatial_merge_size**2, VISION + "blocks"
        for part, rows in zip(PARTS, (P, P, 0, units, units), strict=True):
            trains = any(path.startswith(part) for path in self._trained)
            if part == in_blocks:
                maps, attention = P * self._maps(part), self._vision_attention(P)
                passes_back, rotations = before or trains, self._vision_rotations(P)
                again = float(maps[0]) + attention + rotations - P * self._outputs(part)
                extra = rotations * (1 + passes_back) + again * (self._recomputes and passes_back)
                total += _linear(maps, passes_back) + Flops(attention, 2 * attention * passes_back, extra)
            else:
                total += _linear(rows * self._maps(part), before)
            before |= trains
        return total

    def _vision_attention(self, P: int) -> float:
        window, width, depth = self._vision.window_patches, self._vision.hidden_size, self._vision.depth
        full = len(set(self._vision.fullatt_block_indexes) & set(range(depth)))
        return 4.0 * P * width * (full * P + (depth - full) * window)

    def _vision_rotations(self, P: int) -> float:
        """Of queries and keys, forward."""
        width = self._vision.hidden_size
        return 4.0 * P * self._vision.depth * width * width / self._vision.num_heads

    def _language(self, S: int, read: int) -> Flops:
        """Meta Tokens train, so gradients pass all layers."""
        layers, width, (whole, cut) = self._text.num_hidden_layers, self._text.hidden_size, self._layers()
        all_maps, key_value = self._maps(LANGUAGE) / layers, self._maps(LANGUAGE, ("key", "value")) / layers
        maps = whole * S * all_maps + cut * (S * key_value + read * (all_maps - key_value))
        attention = 4.0 * S * width * (whole * S + cut * read)
        again = whole * S * (float(all_maps[0]) - self._outputs(LANGUAGE) / layers + 4.0 * S * width + sum(self._rotation()))
        extra = 2 * self._language_rotations(S, read) + again * self._recomputes
        return _linear(maps, passes_back=True) + Flops(attention, 2 * attention, extra)

    def _language_rotations(self, S: int, read: int) -> float:
        """Of queries and keys, forward."""
        (whole, cut), (query, key) = self._layers(), self._rotation()
        return whole * S * (query + key) + cut * (read * query + S * key)

    def _rotation(self) -> tuple[float, float]:
        """Of one row's query heads, and of its key heads."""
        text = self._text
        head = text.hidden_size / text.num_attention_heads
        return 2.0 * text.num_attention_heads * head**2, 2.0 * text.num_key_value_heads * head**2

    def _layers(self) -> tuple[int, int]:
        """How many are computed at all rows; of few layers, the last one is computed at the rows that are read."""
        cut = 1 if self._text.num_hidden_layers <= FEW_LAYERS else 0
        return self._text.num_hidden_layers - cut, cut

    def _maps(self, prefix: str, names: Sequence[str] = ()) -> np.ndarray:
        """[forward, gradients of kernels] of linear maps, FLOPs a row: of all under a prefix, or of those with these names."""
        total = np.zeros(2)
        for path, (*stack, inputs, outputs) in self._kernels(prefix):
            if names and path.split(".")[-2] not in names:
                continue
            layers, rank = math.prod(stack), self._rank(path)
            kernel, adapter = 2.0 * layers * inputs * outputs, 2.0 * layers * rank * (inputs + outputs)
            total += kernel + adapter, kernel * (path in self._trained) + adapter
        return total

    def _outputs(self, prefix: str) -> float:
        """FLOPs a row of the last products of each layer of a stack, which nothing in the backward pass needs."""
        total = 0.0
        for path, (layers, inputs, outputs) in self._kernels(prefix + ".mlp.down"):
            total += 2.0 * layers * outputs * (inputs + self._rank(path))
        return total

    def _kernels(self, prefix: str) -> list[tuple[str, tuple[int, ...]]]:
        return [(path, shape) for path, shape in self._shapes.items() if path.startswith(prefix) and path.endswith(".kernel")]

    def _rank(self, path: str) -> int:
        """Of the adapter beside a kernel; 0: none."""
        adapter = self._shapes.get(path.removesuffix(".kernel") + LORA + "a")
        return adapter[-1] if adapter else 0


def _linear(maps: np.ndarray, passes_back: bool) -> Flops:
    forward, kernels = maps.tolist()
    return Flops(forward, forward * passes_back + kernels)
