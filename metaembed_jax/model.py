"""MetaEmbed, as people use it: loading, and encoding of texts and images into nested vectors.

N items, R vectors of an item, D width of a vector.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from metaembed_jax.data.prompts import Example, Processor, ShapeClass, collate
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.network import ModelConfig, abstract_network
from metaembed_jax.sharding import batch_shards, make_mesh, named_sharding

BATCH_SIZE = 32
TOKEN_BUCKET = 32
BATCHES_AHEAD = 16  # how many batches of items are processed, and sorted by shape, before they are encoded


class MetaEmbed:
    """A trained (or fresh) network with its tokenizer and image processing.

    Args:
      config: of the network.
      parameters: nested dicts of arrays, on the mesh.
      processor: turns items into tokens and patches.
      mesh: all devices that encode.
    """

    def __init__(self, config: ModelConfig, parameters: dict, processor: Processor, mesh: Mesh):
        self.config, self.parameters, self.processor, self.mesh = config, parameters, processor, mesh
        self._encode = make_encode(config, mesh)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str = "bfloat16", mesh: Mesh | None = None, seed: int = 0, max_visual_tokens: int = 1024
    ) -> "MetaEmbed":
        """Loads a run of `train.py`, or a Hugging Face directory of a vision-language model, with fresh Meta Tokens.

        Args:
          path: the directory, or a hub id.
          dtype: of activations and matmuls, "bfloat16" or "float32".
          mesh: of `sharding.make_mesh`; by default all devices encode side by side.
          seed: of fresh Meta Tokens.
          max_visual_tokens: cap on the visual tokens of an image.

        Raises:
          UserError: names the file, key or shape that is wrong.
        """
        from metaembed_jax.checkpoints.loading import load

        if dtype not in ("bfloat16", "float32"):
            raise UserError(f"dtype={dtype!r}: expected 'bfloat16' or 'float32'")
        mesh = make_mesh() if mesh is None else mesh
        return cls(*load(path, dtype, mesh, seed, max_visual_tokens), mesh)

    @property
    def meta_tokens(self) -> Float[np.ndarray, "R D"]:
        """The learned rows, query rows first, float32 [query_tokens + candidate_tokens, backbone width]."""
        return np.asarray(self.parameters["meta_tokens"], np.float32)

    def encode_query(
        self, items: Sequence, *, budget: int | None = None, batch_size: int = BATCH_SIZE, progress: bool = False
    ) -> Float[np.ndarray, "N R D"]:
        """Query vectors, each of length one, float32.

        Args:
          items: each a text, a PIL image, or {"text": str, "image": PIL image or encoded bytes} with either or both.
          budget: vectors an item; all by default. A smaller budget is a prefix of a larger one, and cheaper.
          batch_size: items at once on each device.
          progress: show a bar.

        Raises:
          UserError: names the item that cannot be encoded, or a budget beyond the model's.
        """
        return self._encode_items(items, "query", self.processor.query, budget, batch_size, progress)

    def encode_document(
        self, items: Sequence, *, budget: int | None = None, batch_size: int = BATCH_SIZE, progress: bool = False
    ) -> Float[np.ndarray, "N R D"]:
        """Candidate vectors; otherwise as `encode_query`."""
        return self._encode_items(items, "candidate", self.processor.candidate, budget, batch_size, progress)

    def similarity(self, query_QRD, document_NRD, budget: tuple[int, int] | None = None) -> Float[np.ndarray, "Q N"]:
        """MaxSim scores of every query against every document, float32."""
        return np.asarray(maxsim(query_QRD, document_NRD, budget))

    def _encode_items(self, items: Sequence, side: str, process: Callable, budget: int | None, batch_size: int, progress: bool):
        if isinstance(items, str | dict | Image.Image):
            raise UserError(f"a list of items is expected, and this is one {type(items).__name__}: put it in a list")
        limit = self.config.vectors(side)
        budget = limit if budget is None else budget
        if not 1 <= budget <= limit:
            raise UserError(f"budget={budget}: this model has 1 to {limit} {side} vectors")
        width = self.config.embedding_dim or self.parameters["meta_tokens"].shape[1]
        vectors_NRD = np.zeros((len(items), budget, width), np.float32)
        rows_at_once = batch_size * batch_shards(self.mesh)
        stretch = BATCHES_AHEAD * rows_at_once
        with tqdm(total=len(items), desc=f"encoding {side}", unit="item", disable=not progress) as bar:
            for first in range(0, len(items), stretch):
                rows = range(first, min(first + stretch, len(items)))
                examples = {row: process(as_item(items[row]), name=f"item {row}") for row in rows}
                for shape, alike in _by_shape(examples, self.processor.image_config).items():
                    for start in range(0, len(alike), rows_at_once):
                        chosen = alike[start : start + rows_at_once]
                        batch = [examples[row] for row in chosen]
                        vectors_NRD[chosen] = self._encode_batch(batch, shape, side, budget, rows_at_once)
                        bar.update(len(chosen))
        return vectors_NRD

    def _encode_batch(self, examples: list[Example], shape: ShapeClass, side: str, budget: int, rows: int):
        # Every batch has all its rows, so that one program serves, and an item's vectors do not depend on its company.
        batch = collate(examples + [examples[0]] * (rows - len(examples)), shape, 3 * self.processor.image_config.patch_size**2)
        place = functools.partial(named_sharding, self.mesh)
        batch = {key: jax.device_put(x, place(("batch",) + (None,) * (x.ndim - 1))) for key, x in batch.items()}
        with jax.set_mesh(self.mesh):
            vectors_BRD = self._encode(self.parameters, batch, side=side, budget=budget)
        return np.asarray(vectors_BRD)[: len(examples)]


def make_encode(config: ModelConfig, mesh: Mesh) -> Callable:
    """The jitted `(parameters, batch, side=, budget=) -> vectors [B, R, D]` of a network, rows over the batch axes of the mesh."""
    graph, _, _ = abstract_network(config)

    def encode(parameters, batch, side, budget):
        return nnx.merge(graph, parameters)(batch, side, budget)

    return jax.jit(encode, static_argnames=("side", "budget"), out_shardings=named_sharding(mesh, ("batch", None, None)))


def as_item(item) -> dict:
    """A text, a PIL image or a dict, as a dict.

    Raises:
      UserError: it is something else.
    """
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Image.Image):
        return {"image": item}
    if isinstance(item, dict):
        return item
    raise UserError(f"an item is a text, a PIL image or a dict of both, not {type(item).__name__}")


def _by_shape(examples: dict[int, Example], image_config) -> dict[ShapeClass, list[int]]:
    """Rows by padded size. Sizes are few, so that few programs are compiled: tokens in steps, windows four to each doubling."""
    window = (image_config.window_units * image_config.merge_size) ** 2
    groups: dict[ShapeClass, list[int]] = {}
    for row, example in examples.items():
        patches = 0
        if example.patches is not None:
            windows = len(example.patches.mask) // window
            step = 2 ** max(math.ceil(math.log2(windows)) - 3, 0)
            patches = window * step * math.ceil(windows / step)
        tokens = TOKEN_BUCKET * math.ceil(len(example.tokens) / TOKEN_BUCKET)
        groups.setdefault(ShapeClass(tokens, patches), []).append(row)
    return groups
