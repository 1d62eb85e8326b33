"""SmolVLM (arXiv 2504.05299): SigLIP's vision tower before a Llama, as transformers' `modeling_idefics3.py` computes it.

B rows, S tokens, T tiles of all rows, N patches of a tile, D width, H heads, G key/value heads, K head width.

An image is several tiles, and the whole image as one more tile. The tower computes each tile separately; only the language model,
which is causal, sees them together.
"""

from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from metaembed_jax.backbones import backbone, siglip
from metaembed_jax.backbones.attention import attention
from metaembed_jax.backbones.flop_counts import AttentionCount, FlopCount
from metaembed_jax.backbones.layers import GatedMLP, Linear, RMSNorm, rotate, split_heads
from metaembed_jax.backbones.siglip import SiglipTower
from metaembed_jax.backbones.smolvlm.config import Config, TextConfig, VisionConfig
from metaembed_jax.batch.items import Size
from metaembed_jax.sharding import constrain


class VisionTower(SiglipTower):
    """SigLIP's tower, and a projector to one visual token for each square of patches."""

    config: VisionConfig

    def __init__(self, config: VisionConfig, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.projector = Linear(config.hidden_size * config.scale_factor**2, width, axes=("mlp", "embed"), bias=False, rngs=rngs)

    def project(self, x_IND: Float[Array, "T N D"]) -> Float[Array, "T N/scale**2 width"]:
        """Concatenate the states of each square of patches, in raster order, and project them to a visual token (pixel shuffle)."""
        side = self.config.side // self.config.scale_factor
        units = rearrange(x_IND, "t (r i c j) d -> t (r c) (i j d)", r=side, c=side, i=self.config.scale_factor)
        return self.projector(units)


class DecoderLayer(nnx.Module):
    """Pre-norm causal attention with grouped heads and a gated feed-forward; no biases."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        key_value_width = self.key_value_heads * config.head_width
        self.input_norm = RMSNorm(width, epsilon=epsilon, rngs=rngs, layers=layers)
        self.mlp_norm = RMSNorm(width, epsilon=epsilon, rngs=rngs, layers=layers)
        self.query = Linear(width, width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.key = Linear(width, key_value_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.value = Linear(width, key_value_width, axes=("embed", "heads"), bias=False, rngs=rngs, layers=layers)
        self.output = Linear(width, width, axes=("heads", "embed"), bias=False, rngs=rngs, layers=layers)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=False, rngs=rngs, layers=layers)

    def __call__(self, x_BSD, _, segments_BS, cos_BSK, sin_BSK):
        normed = self.input_norm(x_BSD)
        query_BSHK = rotate(split_heads(self.query(normed), self.heads), cos_BSK, sin_BSK)
        key_BSGK = rotate(split_heads(self.key(normed), self.key_value_heads), cos_BSK, sin_BSK)
        value_BSGK = split_heads(self.value(normed), self.key_value_heads)
        mixed = attention(query_BSHK, key_BSGK, value_BSGK, segments_BS, causal=True)
        x_BSD = x_BSD + self.output(mixed.reshape(x_BSD.shape))
        return constrain(x_BSD + self.mlp(self.mlp_norm(x_BSD)), "batch", None, None)


class Backbone(backbone.Backbone):
    """SigLIP's tower before a Llama."""

    tower, layer = VisionTower, DecoderLayer


def flop_counts(config: Config, row: Size) -> tuple[FlopCount, ...]:
    """Count the network on a row; see `backbones.flop_counts`."""
    vision = config.vision_config
    tower = siglip.flop_counts(vision, row.patches, row.patches // vision.scale_factor**2) if row.patches else ()
    return (*tower, language_count(config.text_config, row.tokens))


def language_count(config: TextConfig, S: int) -> FlopCount:
    """Count the language model on a row of S tokens."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_width)
    attention = AttentionCount(config.num_hidden_layers, S, S, S, *heads)
    return FlopCount("layers", S, config.hidden_size, (attention,), last="mlp.down", has_meta=True)
