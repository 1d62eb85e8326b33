"""MetaEmbed, as people use it: loading, and encoding of texts and images into nested vectors.

N items, R vectors of an item, D width of a vector.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int
from PIL import Image
from tqdm import tqdm

from metaembed_jax import hosts
from metaembed_jax.compilation import announced
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.examples import Example, ShapeClass, blank, collate
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.network import ModelConfig, abstract_network
from metaembed_jax.sharding import batch_shards, make_mesh, named_sharding, put_rows, replicated, row_parts, rows_of

BATCH_SIZE = 32
TOKEN_BUCKET = 32
SAMPLES = 16  # along each axis of a parameter, that the fingerprint reads at most
BATCHES_AHEAD = 16  # how many batches of items are processed, and sorted by shape, before they are encoded


class MetaEmbed:
    """A trained (or fresh) network with its tokenizer and image processing.

    Args:
      config: of the network.
      parameters: nested dicts of arrays, on the mesh.
      processor: turns items into tokens and patches: the family's `Processor`.
      mesh: all devices that encode.
    """

    def __init__(self, config: ModelConfig, parameters: dict, processor: object, mesh: Mesh):
        self.config, self.parameters, self.processor, self.mesh = config, parameters, processor, mesh
        self._encode, self._called = make_encode(config, mesh), set()

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

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the network, and of numbers from all over its parameters.

        It says whether vectors are of one model, wherever that was loaded from, and whatever it computes in.
        """
        config = self.config
        fixed = (config.backbone, config.architecture, config.query_tokens, config.candidate_tokens, config.embedding_dim)
        digest = hashlib.sha256(repr((*fixed, config.lora.alpha if config.lora.kernels else None)).encode())
        sample = jax.jit(lambda parameters: jax.tree.map(_sample, parameters), out_shardings=replicated(self.mesh))
        for path, leaf in jax.tree_util.tree_leaves_with_path(sample(self.parameters)):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    @property
    def meta_tokens(self) -> Float[np.ndarray, "R D"]:
        """The learned rows, query rows first, float32 [query_tokens + candidate_tokens, backbone width]."""
        return np.asarray(self.parameters["meta_tokens"], np.float32)

    @property
    def dimension(self) -> int:
        """D, the width of a vector."""
        return self.config.embedding_dim or self.parameters["meta_tokens"].shape[1]

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
        return self._encode_items(items, "query", budget, batch_size, progress)

    def encode_document(
        self, items: Sequence, *, budget: int | None = None, batch_size: int = BATCH_SIZE, progress: bool = False
    ) -> Float[np.ndarray, "N R D"]:
        """Candidate vectors; otherwise as `encode_query`."""
        return self._encode_items(items, "candidate", budget, batch_size, progress)

    def similarity(self, query_QRD, document_NRD, budget: tuple[int, int] | None = None) -> Float[np.ndarray, "Q N"]:
        """MaxSim scores of every query against every document, float32."""
        return np.asarray(maxsim(query_QRD, document_NRD, budget))

    def encode_part(
        self, items: Sequence, side: str, *, budget: int, batch_size: int = BATCH_SIZE, progress: bool = False
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n R D"]]:
        """This host's part of the items, and their vectors. Hosts share the work, and no host holds all of it.

        Args:
          side: "query" or "candidate".

        Returns:
          The rows of `items`, ascending, and a vector set for each; all of them where there is one host.

        Raises:
          UserError: as `encode_query`.
        """
        if isinstance(items, str | dict | Image.Image):
            raise UserError(f"a list of items is expected, and this is one {type(items).__name__}: put it in a list")
        limit = self.config.vectors(side)
        if not 1 <= budget <= limit:
            raise UserError(f"budget={budget}: this model has 1 to {limit} {side} vectors")
        process = {"query": self.processor.query, "candidate": self.processor.candidate}[side]
        parts, mine = row_parts(self.mesh, batch_size * batch_shards(self.mesh))
        rows, at_once = np.arange(mine, len(items), len(parts)), len(parts[mine])
        vectors_NRD = np.zeros((len(rows), budget, self.dimension), np.float32)
        with tqdm(total=len(rows), desc=f"encoding {side}", unit="item", disable=not progress) as bar:
            for first in range(0, -(-len(items) // len(parts)), BATCHES_AHEAD * at_once):
                stretch = range(first, min(first + BATCHES_AHEAD * at_once, len(rows)))
                examples = {n: process(as_item(items[rows[n]]), name=f"item {rows[n]}") for n in stretch}
                alike = _by_shape(examples, self.config.architecture.patch_multiple)
                for shape, batches in _schedule(alike, at_once):
                    for batch in range(batches):
                        chosen = alike.get(shape, [])[batch * at_once : (batch + 1) * at_once]
                        found = self._encode_batch([examples[n] for n in chosen], shape, side, budget, at_once)
                        vectors_NRD[chosen] = found[: len(chosen)]
                        bar.update(len(chosen))
        if len(bad := np.flatnonzero(~np.isfinite(vectors_NRD).all(axis=(1, 2)))):  # a maximum over NaN may hide it
            raise UserError(f"item {rows[bad[0]]}: its vectors hold NaN or infinities; look for them in the checkpoint")
        return rows, vectors_NRD

    def _encode_items(self, items: Sequence, side: str, budget: int | None, batch_size: int, progress: bool):
        budget = self.config.vectors(side) if budget is None else budget
        rows, part_NRD = self.encode_part(items, side, budget=budget, batch_size=batch_size, progress=progress)
        return from_parts(rows, part_NRD, len(items))

    def _encode_batch(self, examples: list[Example], shape: ShapeClass, side: str, budget: int, rows: int):
        # Every batch has all its rows, so that one program serves, and an item's vectors do not depend on its company.
        layout = self.config.architecture.layout
        fill = examples[0] if examples else blank(layout)
        batch = collate(examples + [fill] * (rows - len(examples)), shape, layout)
        with jax.set_mesh(self.mesh):
            batch = {key: put_rows(x, self.mesh) for key, x in batch.items()}
            with announced("the encoder") if (shape, side, budget, rows) not in self._called else contextlib.nullcontext():
                vectors_BRD = self._encode(self.parameters, batch, side=side, budget=budget)
            self._called.add((shape, side, budget, rows))
        return rows_of(vectors_BRD)


def from_parts(rows: Int[np.ndarray, " n"], part: np.ndarray, count: int) -> np.ndarray:
    """All `count` items on every host, from each host's `rows` and what belongs to them."""
    if len(rows) == count:
        return part
    fill = hosts.gather(np.array(len(rows))).max() - len(rows)
    places = hosts.gather(np.pad(rows, (0, fill), constant_values=-1))
    values = hosts.gather(np.pad(part, [(0, fill)] + [(0, 0)] * (part.ndim - 1)))
    whole = np.zeros((count, *part.shape[1:]), part.dtype)
    for place, value in zip(places, values, strict=True):
        whole[place[place >= 0]] = value[place >= 0]
    return whole


def _schedule(alike: dict[ShapeClass, list[int]], rows: int) -> list[tuple[ShapeClass, int]]:
    """The shapes that any host has, and how many batches of each, so that all encode the same ones at the same time."""
    mine = sorted((*shape, -(-len(items) // rows)) for shape, items in alike.items())
    counts = hosts.gather(np.array(len(mine)))
    table = np.zeros((counts.max(), 3), np.int32)
    table[: len(mine)] = np.array(mine, np.int32).reshape(-1, 3)
    most: dict[ShapeClass, int] = {}
    for tokens, patches, batches in hosts.gather(table).reshape(-1, 3).tolist():
        shape = ShapeClass(tokens, patches)
        most[shape] = max(most.get(shape, 0), batches)
    return sorted((shape, batches) for shape, batches in most.items() if batches)


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


def _sample(parameter: jax.Array) -> jax.Array:
    """Some of its numbers, in what all dtypes round to alike."""
    return parameter[tuple(slice(None, None, math.ceil(size / SAMPLES)) for size in parameter.shape)].astype("bfloat16")


def _by_shape(examples: dict[int, Example], multiple: int) -> dict[ShapeClass, list[int]]:
    """Rows by padded size. Sizes are few, so that few programs are compiled: tokens in steps, patches in four to each doubling."""
    groups: dict[ShapeClass, list[int]] = {}
    for row, example in examples.items():
        patches = 0
        if example.patches:
            parts = example.patches // multiple
            step = 2 ** max(math.ceil(math.log2(parts)) - 3, 0)
            patches = multiple * step * math.ceil(parts / step)
        tokens = TOKEN_BUCKET * math.ceil(len(example.tokens) / TOKEN_BUCKET)
        groups.setdefault(ShapeClass(tokens, patches), []).append(row)
    return groups
