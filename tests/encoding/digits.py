"""A network that sums the tokens of each item, for tests of the encoder without a model."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from metaembed_jax.batch.items import ArraySpec, Example, Fitted, Layout, Limits
from metaembed_jax.encoding.encoder import Encoder
from metaembed_jax.errors import UserError
from metaembed_jax.sharding import named_sharding

LAYOUT = Layout({"patches": ArraySpec((2,), "uint8")}, 1, 4, 4)
CONFIG = SimpleNamespace(
    architecture=SimpleNamespace(layout=LAYOUT),
    vectors=lambda side: 4,
    meta_tokens=lambda side, budget: budget,
    reads_states=False,
)


class Processor:
    """Texts of digits: a token each; images are (width, height): a patch a pixel. An item with "torn" fails when it is made."""

    limits = Limits(48, 32, 40, 4, 4)

    def size(self, item, side, *, name):
        if item.get("text") == "bad":
            raise UserError(f"{name}: is bad")
        width, height = item.get("image", (0, 0))
        return Fitted(len(item["text"]), width * height, cut=int(len(item["text"]) == 9), shrunk=False)

    def query(self, item, *, name):
        fitted = self.size(item, "query", name=name)
        if item.get("torn"):
            raise UserError(f"{name}: is torn")
        tokens = np.array([int(x) for x in item["text"]], np.int32)
        arrays = {"patches": np.full((fitted.patches, 2), len(tokens), np.uint8)} if fitted.patches else {}
        visual = np.full(len(tokens), -1, np.int32)
        return Example(tokens, np.arange(len(tokens))[None], visual, arrays, np.ones(fitted.patches, bool), fitted.cut)

    document = query


def digit_encoder(mesh: Mesh) -> Encoder:
    """Return an encoder whose vectors are [sum of the tokens, sum of the pixels, number of the vector]."""

    def encode(_, batch):
        segments_BV = jnp.take_along_axis(batch.segments, batch.reads, axis=1)
        is_own_BVS = segments_BV[:, :, None] == batch.segments[:, None]
        sums_BV = jnp.sum(is_own_BVS * batch.tokens[:, None], axis=-1)
        pixels_BV = jnp.zeros_like(sums_BV)
        if batch.patches is not None:
            is_own_BVP = segments_BV[:, :, None] == batch.patch_segments[:, None]
            pixels_BV = jnp.sum(is_own_BVP * batch.patches[:, None, :, 0], axis=-1)
        meta_BV = jnp.take_along_axis(batch.meta, batch.reads, axis=1)
        return jnp.stack([sums_BV, pixels_BV, meta_BV], axis=-1).astype(jnp.float32)

    return Encoder(CONFIG, Processor(), mesh, jax.jit(encode, out_shardings=named_sharding(mesh, ("batch", None, None))), 3)


def items_of(count, seed=0):
    rng = np.random.default_rng(seed)
    texts = ["".join(map(str, rng.integers(0, 10, rng.integers(1, 20)))) for _ in range(count)]
    return [{"text": text} | ({"image": (4, int(rng.integers(1, 8)))} if rng.random() < 0.7 else {}) for text in texts]


def expected(items, budget):
    def of(item):
        width, height = item.get("image", (0, 0))
        return [[sum(map(int, item["text"])), len(item["text"]) * width * height, vector] for vector in range(budget)]

    return np.array([of(item) for item in items], np.float32).reshape(len(items), budget, 3)
