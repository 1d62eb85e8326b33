"""The parts of Qwen2.5-VL, for counting its arithmetic. P patches, S rows of text, R of them read."""

from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.backbones.qwen.flops import language
from metaembed_jax.backbones.qwen2_5_vl.config import Config, VisionConfig


def parts(config: Config, patches: int, rows: int, read: int) -> tuple[Part, ...]:
    """See `backbones.parts`."""
    return (*(_vision(config.vision_config, patches) if patches else ()), *language(config.text_config, rows, read))


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
