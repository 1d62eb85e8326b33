"""The parts of SmolVLM, for counting its arithmetic. P patches, N of a tile, U units, S tokens."""

from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.backbones.smolvlm.config import Config, TextConfig, VisionConfig
from metaembed_jax.batch.packing import Size


def parts(config: Config, row: Size) -> tuple[Part, ...]:
    """See `backbones.parts`."""
    return (*(_vision(config.vision_config, row.patches) if row.patches else ()), _language(config.text_config, row.tokens))


def _vision(config: VisionConfig, P: int) -> tuple[Part, ...]:
    N, U, heads = config.tile_patches, P // config.scale_factor**2, config.num_attention_heads
    attention = Attention(config.num_hidden_layers, P, P, N, heads, heads, config.hidden_size // heads, rotates=False)
    return (
        Part("vision.patch_embedding", P),
        Part("vision.positions", P),
        Part("vision.blocks", P, config.hidden_size, (attention,), last="mlp.down"),
        Part("vision.final_norm", P),
        Part("vision.projector", U),
    )


def _language(config: TextConfig, S: int) -> Part:
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_width)
    attention = Attention(config.num_hidden_layers, S, S, S, *heads)
    return Part("layers", S, config.hidden_size, (attention,), last="mlp.down", has_meta=True)
