"""SigLIP's vision tower (arXiv 2303.15343), for images, or tiles of them, of one size: its network, weights and FLOPs.

B rows, I images (or tiles) of all rows, N patches of an image, P patches of a row, U units (visual tokens) of a row, D width,
X numbers in a patch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.config import FamilyVisionConfig
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.backbones.layers import MLP, LayerNorm, Linear, normalised, param, scan_layers, split_heads
from metaembed_jax.backbones.weight_map import Source, linear, norm, patches, same
from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig(FamilyVisionConfig):
    """Fields of Hugging Face's `vision_config`; defaults are those of its `SiglipVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6

    @property
    def side(self) -> int:
        """Patches on a side of an image; pixels beyond the last whole patch are not read."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.side**2


class SiglipBlock(nnx.Module):
    """Pre-norm attention over the image and a feed-forward, all with biases."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs, layers: int):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1 = LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs, layers=layers)
        self.norm2 = LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.key = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.value = Linear(width, width, axes=("embed", "heads"), bias=True, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=True, rngs=rngs, layers=layers)
        self.mlp = MLP(width, config.intermediate_size, activation=jax.nn.gelu, rngs=rngs, layers=layers)

    def __call__(self, x_IND, _):
        normed = self.norm1(x_IND)
        query, key, value = (split_heads(project(normed), self.heads) for project in (self.query, self.key, self.value))
        image = jnp.ones(x_IND.shape[:2], jnp.int32)
        mixed = attention(query, key, value, image, causal=False)
        x_IND = x_IND + self.output(mixed.reshape(x_IND.shape))
        return constrain(x_IND + self.mlp(self.norm2(x_IND)), "batch", None, None)


class SiglipTower(nnx.Module):
    """Turns patches of images into visual tokens of the language model's width. The subclass of a family adds the projector."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, width, axes=("patch", "embed"), bias=True, rngs=rngs)
        self.positions = param(rngs, jax.nn.initializers.normal(width**-0.5), (config.patches, width), (None, "embed"))
        self.blocks = SiglipBlock(config, rngs=rngs, layers=config.num_hidden_layers)
        self.final_norm = LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, batch: Batch, *, dtype, checkpoint: bool, unroll: int) -> Float[Array, "B U D"]:
        """Return the visual tokens of each row, image after image."""
        assert batch.patches is not None  # a row without patches does not come here
        B, _, X = batch.patches.shape
        x_IND = self.embed_patches(batch.patches.reshape(-1, self.config.patches, X), dtype)
        x_IND = scan_layers(self.blocks, x_IND, None, checkpoint=checkpoint, unroll=unroll)
        units = self.project(self.final_norm(x_IND))
        return constrain(units.reshape(B, -1, units.shape[-1]), "batch", None, None)

    def embed_patches(self, patches_INX: UInt8[Array, "I N X"], dtype) -> Float[Array, "I N D"]:
        """Normalise uint8 pixels, apply the patch kernel, and add the learned positions."""
        pixels_INX = normalised(patches_INX, self.config.image_mean, self.config.image_std)
        x_IND = self.patch_embedding(pixels_INX.astype(dtype)) + self.positions[...].astype(dtype)
        return constrain(x_IND, "batch", None, None)

    def project(self, x_IND: Float[Array, "I N D"]) -> Float[Array, "I units width"]:
        """Compute the visual tokens of each image from the states of its patches."""
        raise NotImplementedError


def weight_map(tower: str) -> dict[str, Source]:
    """Return the tensors of the tower, without its projector.

    Args:
      tower: prefix of the tensors' names.
    """
    layer = f"{tower}encoder.layers.{{}}"
    return {
        "vision.patch_embedding.kernel": patches(f"{tower}embeddings.patch_embedding.weight"),
        "vision.patch_embedding.bias": same(f"{tower}embeddings.patch_embedding.bias"),
        "vision.positions": same(f"{tower}embeddings.position_embedding.weight"),
        **norm("vision.blocks.norm1", f"{layer}.layer_norm1"),
        **norm("vision.blocks.norm2", f"{layer}.layer_norm2"),
        **linear("vision.blocks.query", f"{layer}.self_attn.q_proj", bias=True),
        **linear("vision.blocks.key", f"{layer}.self_attn.k_proj", bias=True),
        **linear("vision.blocks.value", f"{layer}.self_attn.v_proj", bias=True),
        **linear("vision.blocks.output", f"{layer}.self_attn.out_proj", bias=True),
        **linear("vision.blocks.mlp.up", f"{layer}.mlp.fc1", bias=True),
        **linear("vision.blocks.mlp.down", f"{layer}.mlp.fc2", bias=True),
        **norm("vision.final_norm", f"{tower}post_layernorm"),
    }


def flop_counts(config: SiglipConfig, P: int, U: int) -> tuple[FlopCount, ...]:
    """Count the tower, the projector included, on a row of P patches that become U visual tokens."""
    heads = config.num_attention_heads
    attention = AttentionCount(
        config.num_hidden_layers, P, P, config.patches, heads, heads, config.hidden_size // heads, rotates=False
    )
    return (
        FlopCount("vision.patch_embedding", P),
        FlopCount("vision.positions", P),
        FlopCount("vision.blocks", P, config.hidden_size, (attention,), last="mlp.down"),
        FlopCount("vision.final_norm", P),
        FlopCount("vision.projector", U),
    )
