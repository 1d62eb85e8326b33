"""The parts of Qwen2.5-VL, for counting its arithmetic. P patches."""

from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.backbones.qwen.flops import language
from metaembed_jax.backbones.qwen2_5_vl.config import Config, VisionConfig
from metaembed_jax.batch.packing import Size


def parts(config: Config, row: Size) -> tuple[Part, ...]:
    """See `backbones.parts`."""
    vision = _vision(config.vision_config, row.patches) if row.patches else ()
    return (*vision, *language(config.text_config, row.tokens, row.vectors))


def _vision(config: VisionConfig, P: int) -> tuple[Part, ...]:
    heads = (config.num_heads, config.num_heads, config.hidden_size // config.num_heads)
    full, units = len(set(config.fullatt_block_indexes) & set(range(config.depth))), P // config.spatial_merge_size**2
    windows = Attention(config.depth - full, P, P, config.window_patches, *heads)
    whole = Attention(full, P, P, P, *heads)
    return (
        Part("vision.patch_embedding", P),
        Part("vision.blocks", P, config.hidden_size, (windows, whole), last="mlp.down"),
        Part("vision.merger_norm", P),
        Part("vision.merger_up", units),
        Part("vision.merger_down", units),
    )
