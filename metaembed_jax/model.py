"""The public model: load it, and encode texts and images into nested vectors.

A model with `readout="states"` has a vector for each token of an item. Items differ in their number, and zeros follow the last
vector of an item. They are not nested: a smaller budget of documents is a pooling of all of them.

N items, R vectors of an item, D width of a vector.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from PIL import Image
from tqdm import tqdm

from metaembed_jax.encoding.blocks import EncodedBlock
from metaembed_jax.encoding.encoder import Encoder, Reduced
from metaembed_jax.errors import UserError
from metaembed_jax.hosts.shares import join_shares
from metaembed_jax.inputs.processors import PromptProcessor
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.late_interaction.pooling import Pools
from metaembed_jax.network import ModelConfig, make_encode
from metaembed_jax.sharding import replicated, shard_bytes

SAMPLES = 16  # of a parameter along each axis, at most, that the fingerprint reads


class MetaEmbed:
    """A trained (or fresh) network with its tokenizer and image processing.

    Args:
      config: configuration of the network.
      parameters: nested dicts of arrays, on the mesh.
      processor: the family's `Processor`, which turns items into tokens and patches.
      mesh: all devices that encode.
    """

    def __init__(self, config: ModelConfig, parameters: dict, processor: PromptProcessor, mesh: Mesh):
        self.config, self.parameters, self.processor, self.mesh = config, parameters, processor, mesh
        self._encoder = Encoder(config, processor, mesh, make_encode(config, mesh), self.dimension)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str = "bfloat16", mesh: Mesh | None = None, seed: int = 0, max_visual_tokens: int = 1024
    ) -> "MetaEmbed":
        """Load a run of `train.py`, or a vision-language model from Hugging Face with fresh Meta Tokens.

        Args:
          path: the directory, or a hub id.
          dtype: type of activations and matmuls, "bfloat16" or "float32".
          mesh: result of `mesh.make_mesh`; by default all devices along the data axis, with the smallest fsdp axis at which the
            weights fit.
          seed: seed of fresh Meta Tokens.
          max_visual_tokens: cap on the visual tokens of an image.

        Raises:
          UserError: names the file, key or shape that is wrong.
        """
        from metaembed_jax.checkpoints.loading import default_mesh, load

        if dtype not in ("bfloat16", "float32"):
            raise UserError(f"dtype={dtype!r}: expected 'bfloat16' or 'float32'")
        mesh = default_mesh(path, dtype) if mesh is None else mesh
        return cls(*load(path, dtype, mesh, seed, max_visual_tokens), mesh)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the network and of samples of all its parameters.

        The same model has the same fingerprint in any folder and with any dtype.
        """
        config = self.config
        fixed = (config.backbone, config.architecture, config.query_tokens, config.document_tokens, config.embedding_dim)
        fixed += (config.readout,) if config.reads_states else ()
        digest = hashlib.sha256(repr((*fixed, config.lora.alpha if config.lora.kernels else None)).encode())
        sample = jax.jit(lambda parameters: jax.tree.map(_sample, parameters), out_shardings=replicated(self.mesh))
        for path, leaf in jax.tree_util.tree_leaves_with_path(sample(self.parameters)):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    @property
    def meta_tokens(self) -> Float[np.ndarray, "R D"]:
        """The learned Meta Tokens, first those of queries, float32 [query_tokens + document_tokens, backbone width].

        A model with `readout="states"` has none.
        """
        if self.config.reads_states:
            return np.zeros((0, self.config.architecture.width), np.float32)
        return np.asarray(self.parameters["meta_tokens"], np.float32)

    @property
    def dimension(self) -> int:
        """D, the width of a vector."""
        return self.config.embedding_dim or self.config.architecture.width

    @property
    def largest_budget(self) -> Budget:
        """All vectors of a query and of a document, and D."""
        return Budget(self.config.query_tokens, self.config.document_tokens, self.dimension)

    def encode_query(self, items: Sequence, *, budget: int | None = None, progress: bool = False) -> Float[np.ndarray, "N R D"]:
        """Return the query vectors of items, each of length one, float32.

        Args:
          items: each a text, a PIL image, or {"text": str, "image": PIL image or encoded bytes} with either or both. If an item is
            too large for a row, its image is shrunk or its text is cut, and a line on stderr reports it.
          budget: vectors of an item; all by default. A smaller budget is a prefix of a larger one, and cheaper. With
            `readout="states"`, documents are pooled to that number (`late_interaction.pooling`), and queries have all.
          progress: show a bar.

        Raises:
          UserError: an item cannot be encoded (names it), or the budget is larger than the model's.
        """
        return self._encode_items(items, "query", budget, progress)

    def encode_document(self, items: Sequence, *, budget: int | None = None, progress: bool = False) -> Float[np.ndarray, "N R D"]:
        """Return the document vectors of items; otherwise as `encode_query`."""
        return self._encode_items(items, "document", budget, progress)

    def similarity(self, query_QRD, document_NRD, budget: Sequence[int] | None = None) -> Float[np.ndarray, "Q N"]:
        """Return the MaxSim scores of every query and every document, float32."""
        mask_NR = np.any(document_NRD, axis=2) if self.config.reads_states else None
        return np.asarray(maxsim(query_QRD, document_NRD, budget, mask_NR))

    def encode_share(
        self, items: Sequence, side: str, *, budget: int, progress: bool = False
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n R D"]]:
        """Encode this host's share of the items, so that no host holds all vectors.

        Args:
          side: "query" or "document".

        Returns:
          The indices of the share in `items`, ascending, and their vectors; a single host has all items.

        Raises:
          UserError: as `encode_query`.
        """
        self._check(items, side, budget)
        with tqdm(total=len(items), desc=f"encoding {side}", unit="item", disable=not progress) as bar:
            blocks = list(self.encode_blocks(items, side, budget=budget, bar=bar))
        if not blocks:
            return np.zeros(0, np.int64), np.zeros((0, budget, self.dimension), np.float32)
        return blocks[0].numbers, blocks[0].vectors

    def encode_blocks(
        self,
        items: Sequence,
        side: str,
        *,
        budget: int,
        size: int | None = None,
        start: int = 0,
        bar: tqdm | None = None,
        allow_failures: bool = False,
    ) -> Iterator[EncodedBlock]:
        """Yield this host's share of each block of consecutive items, in order, as soon as it is complete.

        Blocks are packed one by one: vectors of a block have the same bits whatever was encoded before it.

        Args:
          side: "query" or "document".
          size: items of a block; the last may have fewer. By default, all items are one block.
          start: the index of the first item.
          bar: advances by the items of all hosts.
          allow_failures: encode the other items when some cannot be, and report those in `failures` of their block.

        Raises:
          UserError: as `encode_query`.
        """
        self._check(items, side, budget)
        encoded = self.config.vectors(side) if self.config.reads_states else budget
        blocks = self._encoder.blocks(
            self.parameters, items, side, encoded, size=size, start=start, bar=bar, allow_failures=allow_failures
        )
        for block in blocks:
            yield block if budget == encoded else block._replace(vectors=Pools(block.vectors).pool(budget))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters on a device."""
        return shard_bytes(self.parameters)

    @property
    def reduced(self) -> Reduced:
        """The items of the last call that were shrunk or cut to fit a row."""
        return self._encoder.reduced

    def _check(self, items: Sequence, side: str, budget: int) -> None:
        if isinstance(items, str | dict | Image.Image) or not hasattr(items, "__len__"):
            raise UserError(f"expected a list of items, not a {type(items).__name__}; put a single item in a list")
        limit = self.config.vectors(side)
        if not 1 <= budget <= limit:
            raise UserError(f"budget={budget}: expected 1 to {limit} {side} vectors for this model")
        if self.config.reads_states and side == "query" and budget < limit:
            raise UserError(f"budget={budget}: this model reads all states of a query, at most {limit}, and has no smaller budget")

    def _encode_items(self, items: Sequence, side: str, budget: int | None, progress: bool) -> Float[np.ndarray, "N R D"]:
        budget = self.config.vectors(side) if budget is None else budget
        indices, share_nRD = self.encode_share(items, side, budget=budget, progress=progress)
        return join_shares(indices, share_nRD, len(items))


def _sample(parameter: jax.Array) -> jax.Array:
    """Return some numbers of a parameter in bfloat16, where all dtypes agree."""
    return parameter[tuple(slice(None, None, math.ceil(size / SAMPLES)) for size in parameter.shape)].astype("bfloat16")
