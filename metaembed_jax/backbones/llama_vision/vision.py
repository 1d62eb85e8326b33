"""The vision tower: an image as tiles, all of which look at each other.

B rows, P patches of a row or an image, J images of all rows, X numbers in a patch, M tiles of an image, N tokens of a tile, Q those
and what fills them up to a multiple of 8, L = M * Q, D width, I width of what comes out, T states of a row, M * N for each image.

A row holds whole images, so they are the tower's batch. It computes M tiles for every image, because transformers does: a token
of a real tile attends to padding too, and its numbers would change without. Only padding does not attend to padding:

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
from metaembed_jax.batch.rows import Batch
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

    def __call__(self, x_JLD, _, padding_JL):
        normed = self.attention_norm(x_JLD)
        query, key, value = (split_heads(project(normed), self.heads) for project in (self.query, self.key, self.value))
        mixed = attend_around_padding(query, key, value, padding_JL)
        x_JLD = x_JLD + gated(self.attention_gate, self.output(mixed.reshape(x_JLD.shape)))
        return constrain(x_JLD + gated(self.mlp_gate, self.mlp(self.mlp_norm(x_JLD))), "batch", None, None)


def attend_around_padding(
    query_JLHK: Float[Array, "J L H K"],
    key_JLHK: Float[Array, "J L H K"],
    value_JLHK: Float[Array, "J L H K"],
    padding_JL: Bool[Array, "J L"],
) -> Float[Array, "J L H K"]:
    """Attention in which only padding does not see padding.

    Heads get one more number, of 0 for what is image, whose product is far below every score where query and key are padding and
    exactly 0 elsewhere: no kernel needs to know of such a mask, and a TPU's registers, 128 wide, have the room.
    """
    apart_JLH1 = jnp.broadcast_to(jnp.where(padding_JL, APART, 0.0)[..., None, None], (*query_JLHK.shape[:3], 1))
    apart_JLH1 = apart_JLH1.astype(query_JLHK.dtype)
    query, key = (jnp.concatenate([x, far], axis=-1) for x, far in ((query_JLHK, -apart_JLH1), (key_JLHK, apart_JLH1)))
    value = jnp.pad(value_JLHK, ((0, 0), (0, 0), (0, 0), (0, 1)))
    segments_JL, scale = jnp.ones_like(padding_JL, jnp.int32), query_JLHK.shape[-1] ** -0.5
    return attention(query, key, value, segments_JL, segments_JL, causal=False, scale=scale)[..., :-1]


class VisionTower(nnx.Module):
    """Patches of each row's images to what the language model's cross-attention reads."""

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

    def __call__(self, batch: Batch, *, dtype, checkpoint: bool, unroll: int) -> tuple[Float[Array, "B T I"], Int[Array, "B T"]]:
        """The states that text may look at, of one image of a row after the other, and their segments.

        States of padding are finite, and their segment is 0.
        """
        config, rows = self.config, len(batch.patches)
        M, N = config.max_num_tiles, config.tile_patches + 1
        patches_JPX, segments_JP, ratio_JP = (
            x.reshape(-1, config.image_patches, *x.shape[2:])
            for x in (batch.patches, batch.patch_segments, batch.patch_arrays["aspect_ratio"])
        )
        ratio_J, segments_JM = ratio_JP[:, 0], segments_JP[:, :: config.tile_patches]

        x_JMND = self.embed(self.embed_patches(patches_JPX, segments_JP > 0, dtype), ratio_J)
        x_JMQD = jnp.pad(x_JMND, ((0, 0), (0, 0), (0, -N % FILLED_TO), (0, 0)))
        padding_JMQ = (segments_JM == 0)[:, :, None] | (jnp.arange(x_JMQD.shape[2]) >= N)
        context, how = padding_JMQ.reshape(len(ratio_J), -1), dict(checkpoint=checkpoint, unroll=unroll)

        x_JLD = x_JMQD.reshape(len(ratio_J), -1, config.hidden_size)
        x_JLD, kept_KJLD = scan_and_keep(self.layers, x_JLD, config.intermediate_layers_indices, context, **how)
        x_JMQD = self.after_tiles(self.norm_after(x_JLD).reshape(x_JMQD.shape), ratio_J)
        x_JLD = scan_layers(self.global_layers, x_JMQD.reshape(x_JLD.shape), None, context, **how)
        states = x_JLD, jnp.moveaxis(kept_KJLD, 0, -1)  # of the latter, the layer turns fastest
        states_JMNI = [x.reshape(len(ratio_J), M, x_JMQD.shape[2], -1)[:, :, :N] for x in states]
        out_JMNI = self.projector(jnp.concatenate(states_JMNI, axis=-1))
        segments_BT = jnp.repeat(segments_JM.reshape(rows, -1), N, axis=1)
        return constrain(out_JMNI.reshape(*segments_BT.shape, -1), "batch", None, None), segments_BT

    def embed_patches(self, patches_JPX: UInt8[Array, "J P X"], is_image_JP: Bool[Array, "J P"], dtype) -> Float[Array, "J P D"]:
        """uint8 pixels to normalised floats, then the patch kernel. Padding is 0, as of pixels that are 0 when normalised."""
        pixels = normalised(patches_JPX, self.config.image_mean, self.config.image_std) * is_image_JP[..., None]
        return constrain(self.patch_embedding(pixels.astype(dtype)), "batch", None, None)

    def embed(self, patches_JPD: Float[Array, "J P D"], ratio_J: Int[Array, "J"]) -> Float[Array, "J M N D"]:
        """All tiles, a class token ahead of each one's patches, with the place of each in tile and image."""
        x_JMND = patches_JPD.reshape(len(ratio_J), -1, self.config.tile_patches, patches_JPD.shape[-1])
        x_JMND = self.before_tiles(x_JMND, ratio_J)
        class_JM1D = jnp.broadcast_to(self.class_embedding[...].astype(x_JMND.dtype), (*x_JMND.shape[:2], 1, x_JMND.shape[3]))
        x_JMND = jnp.concatenate([class_JM1D, x_JMND], axis=2)
        closed = 1 - jnp.tanh(self.tile_positions.gate[...])
        x_JMND = x_JMND + (closed * self.position_embedding[...]).astype(x_JMND.dtype)
        return constrain(self.norm_before(self.tile_positions(x_JMND, ratio_J)), "batch", None, None, None)


class TileEmbedding(nnx.Module):
    """A gated table of what each tile, or each token of each tile, gets added in an image of an arrangement."""

    def __init__(self, ids: int, tiles: int, tokens: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (ids, tiles * tokens * width), (None, "embed"))
        self.gate = param(rngs, jax.nn.initializers.ones, (1,), (None,))

    def __call__(self, x_JMND: Float[Array, "J M N D"], ratio_J: Int[Array, "J"]) -> Float[Array, "J M N D"]:
        J, M, _, D = x_JMND.shape
        added_JMND = jnp.take(self.embedding[...].astype(x_JMND.dtype), ratio_J, axis=0).reshape(J, M, -1, D)
        return x_JMND + gated(self.gate, added_JMND)
