"""The vision tower: an image as tiles, all of which look at each other.

B batch, P patches of the batch, X numbers in a patch, T tiles of the batch, M the most tiles of an image, N tokens of a tile,
Q those and what fills them up to a multiple of 8, D width, I width of what comes out.

The tower computes M tiles for every image, because transformers does: a token of a real tile attends to padding too, and its
numbers would change without. Only padding does not attend to padding:

    keys        image  padding
    image         x       x
    padding       x       .
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.layers import MLP, LayerNorm, Linear, normalised, param, scan_and_keep, scan_layers, split_heads
from metaembed_jax.backbones.llama_vision.config import VisionConfig
from metaembed_jax.sharding import constrain

OUTER_EPSILON = 1e-5  # of the norms around the layers, whatever the config says of those in them
FILLED_TO = 8  # a multiple of which the tokens of a tile become
APART = 1024.0  # exact in bfloat16; its square lowers a score to nothing


def gelu(x: Array) -> Array:
    """By the error function, not its usual approximation."""
    return jax.nn.gelu(x, approximate=False)


def gated(gate: nnx.Param | None, x: Array) -> Array:
    """x * tanh(gate), or x where there is no gate."""
    return x if gate is None else x * jnp.tanh(gate[...]).astype(x.dtype)


class VisionLayer(nnx.Module):
    """Pre-norm attention over all tiles, and a feed-forward; both gated in the global layers."""

    def __init__(self, config: VisionConfig, *, is_gated: bool, rngs: nnx.Rngs, layers: int):
        width = config.hidden_size
        self.heads = config.attention_heads
        self.attention_norm = LayerNorm(width, epsilon=config.norm_eps, rngs=rngs, layers=layers)
        self.mlp_norm = LayerNorm(width, epsilon=config.norm_eps, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.key = Linear(width, width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.value = Linear(width, width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=False, rngs=rngs, layers=layers)
        self.mlp = MLP(width, config.intermediate_size, activation=gelu, rngs=rngs, layers=layers)
        self.attention_gate = param(rngs, jax.nn.initializers.ones, (1,), (None,), layers) if is_gated else None
        self.mlp_gate = param(rngs, jax.nn.initializers.ones, (1,), (None,), layers) if is_gated else None

    def __call__(self, x_BQD, _, padding_BQ):
        normed = self.attention_norm(x_BQD)
        query, key, value = (split_heads(project(normed), self.heads) for project in (self.query, self.key, self.value))
        mixed = attend_around_padding(query, key, value, padding_BQ)
        x_BQD = x_BQD + gated(self.attention_gate, self.output(mixed.reshape(x_BQD.shape)))
        return constrain(x_BQD + gated(self.mlp_gate, self.mlp(self.mlp_norm(x_BQD))), "batch", None, None)


def attend_around_padding(
    query_BQHK: Float[Array, "B Q H K"],
    key_BQHK: Float[Array, "B Q H K"],
    value_BQHK: Float[Array, "B Q H K"],
    padding_BQ: Bool[Array, "B Q"],
) -> Float[Array, "B Q H K"]:
    """Attention in which only padding does not see padding.

    Heads get one more number, of 0 for what is image, whose product is far below every score where query and key are padding and
    exactly 0 elsewhere: no kernel needs to know of such a mask, and a TPU's registers, 128 wide, have the room.
    """
    apart_BQH1 = jnp.broadcast_to(jnp.where(padding_BQ, APART, 0.0)[..., None, None], (*query_BQHK.shape[:3], 1))
    apart_BQH1 = apart_BQH1.astype(query_BQHK.dtype)
    query, key = (jnp.concatenate([x, far], axis=-1) for x, far in ((query_BQHK, -apart_BQH1), (key_BQHK, apart_BQH1)))
    value = jnp.pad(value_BQHK, ((0, 0), (0, 0), (0, 0), (0, 1)))
    scale = query_BQHK.shape[-1] ** -0.5
    return attention(query, key, value, jnp.ones_like(padding_BQ), causal=False, scale=scale)[..., :-1]


class VisionTower(nnx.Module):
    """Patches of one image per row to what the language model's cross-attention reads."""

    def __init__(self, config: VisionConfig, out: int, *, rngs: nnx.Rngs):
        self.config = config
        width, tiles, tokens = config.hidden_size, config.max_num_tiles, config.tile_patches + 1
        ids, small = len(config.arrangements) + 1, jax.nn.initializers.normal(0.02)
        self.patch_embedding = Linear(3 * config.patch_size**2, width, axes=("patch", "embed"), bias=False, rngs=rngs)
        self.class_embedding = param(rngs, small, (width,), ("embed",))
        self.before_tiles = TileEmbedding(ids, tiles, 1, width, rngs=rngs)
        self.position_embedding = param(rngs, small, (tokens, width), (None, "embed"))
        self.tile_positions = TileEmbedding(ids, tiles, tokens, width, rngs=rngs)
        self.norm_before = LayerNorm(width, epsilon=OUTER_EPSILON, rngs=rngs)
        self.layers = VisionLayer(config, is_gated=False, rngs=rngs, layers=config.num_hidden_layers)
        self.norm_after = LayerNorm(width, epsilon=OUTER_EPSILON, rngs=rngs)
        self.after_tiles = TileEmbedding(ids, tiles, 1, width, rngs=rngs)
        self.global_layers = VisionLayer(config, is_gated=True, rngs=rngs, layers=config.num_global_layers)
        self.projector = Linear(config.vision_output_dim, out, axes=("mlp", "embed"), bias=True, rngs=rngs)

    def __call__(
        self, patches_BPX: UInt8[Array, "B P X"], aspect_ratio_BP: Int[Array, "B P"], *, dtype, checkpoint: bool, unroll: int
    ) -> tuple[Float[Array, "B T*N I"], Bool[Array, "B T*N"]]:
        """What text may look at, tile after tile, and which of it is of the image.

        Args:
          aspect_ratio_BP: the id of an image's arrangement of tiles at all of its patches, 0 in padding; in a row without image
            what comes back is finite, and nothing of it is of the image.
        """
        config, B = self.config, len(patches_BPX)
        M, N = config.max_num_tiles, config.tile_patches + 1
        T = min(patches_BPX.shape[1] // config.tile_patches, M)  # what a class holds beyond an image's tiles is padding
        patches_BPX, aspect_ratio_BP = patches_BPX[:, : T * config.tile_patches], aspect_ratio_BP[:, : T * config.tile_patches]
        ratio_B, is_tile_BT = aspect_ratio_BP[:, 0], aspect_ratio_BP[:, :: config.tile_patches] > 0

        x_BMND = self.embed(self.embed_patches(patches_BPX, aspect_ratio_BP > 0, dtype), ratio_B)
        x_BMQD = jnp.pad(x_BMND, ((0, 0), (0, 0), (0, -N % FILLED_TO), (0, 0)))
        is_tile_BM = jnp.pad(is_tile_BT, ((0, 0), (0, M - T)))
        padding_BMQ = ~is_tile_BM[:, :, None] | (jnp.arange(x_BMQD.shape[2]) >= N)
        context, how = padding_BMQ.reshape(B, -1), dict(checkpoint=checkpoint, unroll=unroll)

        x_BLD = x_BMQD.reshape(B, -1, config.hidden_size)
        x_BLD, kept_KBLD = scan_and_keep(self.layers, x_BLD, config.intermediate_layers_indices, context, **how)
        x_BMQD = self.after_tiles(self.norm_after(x_BLD).reshape(x_BMQD.shape), ratio_B)
        x_BLD = scan_layers(self.global_layers, x_BMQD.reshape(x_BLD.shape), None, context, **how)
        states = x_BLD, jnp.moveaxis(kept_KBLD, 0, -1)  # of the latter, the layer turns fastest
        states_BTNI = [x.reshape(B, M, x_BMQD.shape[2], -1)[:, :T, :N] for x in states]
        out_BTNI = self.projector(jnp.concatenate(states_BTNI, axis=-1))
        return constrain(out_BTNI.reshape(B, T * N, -1), "batch", None, None), jnp.repeat(is_tile_BT, N, axis=1)

    def embed_patches(self, patches_BPX: UInt8[Array, "B P X"], is_image_BP: Bool[Array, "B P"], dtype) -> Float[Array, "B P D"]:
        """uint8 pixels to normalised floats, then the patch kernel. Padding is 0, as of pixels that are 0 when normalised."""
        pixels = normalised(patches_BPX, self.config.image_mean, self.config.image_std) * is_image_BP[..., None]
        return constrain(self.patch_embedding(pixels.astype(dtype)), "batch", None, None)

    def embed(self, patches_BPD: Float[Array, "B P D"], ratio_B: Int[Array, "B"]) -> Float[Array, "B M N D"]:
        """All tiles an image may have, a class token ahead of each one's patches, with the place of each in tile and image."""
        B, _, D = patches_BPD.shape
        x_BTND = patches_BPD.reshape(B, -1, self.config.tile_patches, D)
        x_BMND = jnp.pad(x_BTND, ((0, 0), (0, self.config.max_num_tiles - x_BTND.shape[1]), (0, 0), (0, 0)))
        x_BMND = self.before_tiles(x_BMND, ratio_B)
        class_BM1D = jnp.broadcast_to(self.class_embedding[...].astype(x_BMND.dtype), (*x_BMND.shape[:2], 1, D))
        x_BMND = jnp.concatenate([class_BM1D, x_BMND], axis=2)
        closed = 1 - jnp.tanh(self.tile_positions.gate[...])
        x_BMND = x_BMND + (closed * self.position_embedding[...]).astype(x_BMND.dtype)
        return constrain(self.norm_before(self.tile_positions(x_BMND, ratio_B)), "batch", None, None, None)


class TileEmbedding(nnx.Module):
    """A gated table of what each tile, or each token of each tile, gets added in an image of an arrangement."""

    def __init__(self, ids: int, tiles: int, tokens: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (ids, tiles * tokens * width), (None, "embed"))
        self.gate = param(rngs, jax.nn.initializers.ones, (1,), (None,))

    def __call__(self, x_BMND: Float[Array, "B M N D"], ratio_B: Int[Array, "B"]) -> Float[Array, "B M N D"]:
        B, M, _, D = x_BMND.shape
        added_BMND = jnp.take(self.embedding[...].astype(x_BMND.dtype), ratio_B, axis=0).reshape(B, M, -1, D)
        return x_BMND + gated(self.gate, added_BMND)
