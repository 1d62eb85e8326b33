"""The vision tower of Llama-3.2-Vision: an image is a set of tiles, and their tokens attend to each other.

B rows, P patches of a row or an image, J images of all rows, X numbers in a patch, M tiles of an image, N tokens of a tile,
Q tokens of a tile padded to a multiple of 8, L = M * Q, D width, I width of the output, T states of a row, M * N an image.

A row holds whole images, and the tower's batch is the images. It computes M tiles for every image, as transformers does: tokens of
real tiles also attend to padding, and have other values without it. Only padding does not attend to padding:

    keys        image  padding
    image         x       x
    padding       x       .
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.backbones.layers import MLP, LayerNorm, Linear, normalised, param, scan_and_keep, scan_layers, split_heads
from metaembed_jax.backbones.llama_vision.config import VisionConfig
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain

OUTER_EPSILON = 1e-5  # of the norms around the layers; the norms in the layers have the config's
FILLED_TO = 8  # the tokens of a tile are padded to a multiple of this
APART = 1024.0  # exact in bfloat16; a score less its square has a weight of 0


def gelu(x: Array) -> Array:
    """Return GELU by the error function, not its usual approximation."""
    return jax.nn.gelu(x, approximate=False)


def gated(gate: nnx.Param | None, x: Array) -> Array:
    """Return x * tanh(gate), or x if there is no gate."""
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
    """Attention between all tokens, except from padding to padding.

    Heads get one more number, which is 0 for image tokens. Its product is far below every score if query and key are padding, and
    exactly 0 otherwise. So kernels need no such mask, and a TPU's registers, 128 wide, have room for it.
    """
    apart_JLH1 = jnp.broadcast_to(jnp.where(padding_JL, APART, 0.0)[..., None, None], (*query_JLHK.shape[:3], 1))
    apart_JLH1 = apart_JLH1.astype(query_JLHK.dtype)
    query, key = (jnp.concatenate([x, far], axis=-1) for x, far in ((query_JLHK, -apart_JLH1), (key_JLHK, apart_JLH1)))
    value = jnp.pad(value_JLHK, ((0, 0), (0, 0), (0, 0), (0, 1)))
    segments_JL, scale = jnp.ones_like(padding_JL, jnp.int32), query_JLHK.shape[-1] ** -0.5
    return attention(query, key, value, segments_JL, causal=False, scale=scale)[..., :-1]


class VisionTower(nnx.Module):
    """Turns the patches of each row's images into the states that the language model's cross-attention reads."""

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
        """Return the states of a row's images, one image after another, and their segments.

        States of padding are finite, and their segment is 0.
        """
        assert batch.patches is not None and batch.patch_segments is not None  # a row without patches does not come here
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
        padding_JL = padding_JMQ.reshape(len(ratio_J), -1)

        x_JLD = x_JMQD.reshape(len(ratio_J), -1, config.hidden_size)
        x_JLD, kept_KJLD = scan_and_keep(
            self.layers, x_JLD, config.intermediate_layers_indices, padding_JL, checkpoint=checkpoint, unroll=unroll
        )
        x_JMQD = self.after_tiles(self.norm_after(x_JLD).reshape(x_JMQD.shape), ratio_J)
        x_JLD = x_JMQD.reshape(x_JLD.shape)
        x_JLD = scan_layers(self.global_layers, x_JLD, None, padding_JL, checkpoint=checkpoint, unroll=unroll)
        states = x_JLD, jnp.moveaxis(kept_KJLD, 0, -1)  # of the kept states, layers are the fastest axis
        states_JMNI = [x.reshape(len(ratio_J), M, x_JMQD.shape[2], -1)[:, :, :N] for x in states]
        out_JMNI = self.projector(jnp.concatenate(states_JMNI, axis=-1))
        segments_BT = jnp.repeat(segments_JM.reshape(rows, -1), N, axis=1)
        return constrain(out_JMNI.reshape(*segments_BT.shape, -1), "batch", None, None), segments_BT

    def embed_patches(self, patches_JPX: UInt8[Array, "J P X"], is_image_JP: Bool[Array, "J P"], dtype) -> Float[Array, "J P D"]:
        """Normalise uint8 pixels, and apply the patch kernel. The normalised pixels of padding are 0."""
        pixels = normalised(patches_JPX, self.config.image_mean, self.config.image_std) * is_image_JP[..., None]
        return constrain(self.patch_embedding(pixels.astype(dtype)), "batch", None, None)

    def embed(self, patches_JPD: Float[Array, "J P D"], ratio_J: Int[Array, "J"]) -> Float[Array, "J M N D"]:
        """Put a class token before the patches of each tile, and add the positions in tile and image."""
        x_JMND = patches_JPD.reshape(len(ratio_J), -1, self.config.tile_patches, patches_JPD.shape[-1])
        x_JMND = self.before_tiles(x_JMND, ratio_J)
        class_JM1D = jnp.broadcast_to(self.class_embedding[...].astype(x_JMND.dtype), (*x_JMND.shape[:2], 1, x_JMND.shape[3]))
        x_JMND = jnp.concatenate([class_JM1D, x_JMND], axis=2)
        closed = 1 - jnp.tanh(self.tile_positions.gate[...])
        x_JMND = x_JMND + (closed * self.position_embedding[...]).astype(x_JMND.dtype)
        return constrain(self.norm_before(self.tile_positions(x_JMND, ratio_J)), "batch", None, None, None)


class TileEmbedding(nnx.Module):
    """A gated table of embeddings that are added to each tile, or each token of each tile, by the arrangement of its image."""

    def __init__(self, ids: int, tiles: int, tokens: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = param(rngs, jax.nn.initializers.normal(0.02), (ids, tiles * tokens * width), (None, "embed"))
        self.gate = param(rngs, jax.nn.initializers.ones, (1,), (None,))

    def __call__(self, x_JMND: Float[Array, "J M N D"], ratio_J: Int[Array, "J"]) -> Float[Array, "J M N D"]:
        J, M, _, D = x_JMND.shape
        added_JMND = jnp.take(self.embedding[...].astype(x_JMND.dtype), ratio_J, axis=0).reshape(J, M, -1, D)
        return x_JMND + gated(self.gate, added_JMND)


def vision_counts(config: VisionConfig, P: int, T: int) -> tuple[FlopCount, ...]:
    """Count the tower on a row of P patches, whose images have T states."""
    J, Q = P // config.image_patches, config.max_num_tiles * FILLED_TO * -(-(config.tile_patches + 1) // FILLED_TO)
    # Heads have one more number, as in `attend_around_padding`.
    heads = (config.attention_heads, config.attention_heads, config.hidden_size // config.attention_heads + 1)
    local, whole = (
        AttentionCount(layers, J * Q, J * Q, Q, *heads, rotates=False)
        for layers in (config.num_hidden_layers, config.num_global_layers)
    )
    tables = ("before_tiles", "class_embedding", "position_embedding", "tile_positions", "norm_before")
    return (
        FlopCount("vision.patch_embedding", P),
        *(FlopCount(f"vision.{name}", 0) for name in tables),
        FlopCount("vision.layers", J * Q, config.hidden_size, (local,), last="mlp.down"),
        *(FlopCount(f"vision.{name}", 0) for name in ("norm_after", "after_tiles")),
        FlopCount(
            "vision.global_layers", J * Q, config.hidden_size, (whole,), last="mlp.down", gate="vision.global_layers.mlp_gate"
        ),
        FlopCount("vision.projector", T),
    )
