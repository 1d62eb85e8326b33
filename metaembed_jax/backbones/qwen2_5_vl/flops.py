"""The parts of Qwen2.5-VL, for counting its arithmetic. P patches, S rows of text, R of them read."""

from metaembed_jax.backbones.layers import cuts_last
from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.backbones.qwen2_5_vl.config import Config, TextConfig, VisionConfig


def parts(config: Config, patches: int, rows: int, read: int) -> tuple[Part, ...]:
    """See `backbones.parts`."""
    return (*(_vision(config.vision_config, patches) if patches else ()), *_language(config.text_config, rows, read))


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


def _language(config: TextConfig, S: int, R: int) -> tuple[Part, ...]:
    heads = (config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    cut = int(cuts_last(config.num_hidden_layers))
    attention = (Attention(config.num_hidden_layers - cut, S, S, S, *heads),)
    last = Part(
        "layers",
        R,
        config.hidden_size,
        (Attention(1, R, S, S, *heads),),
        other_rows={"key": S, "value": S},
        scanned=False,
        appended=True,
    )
    return (Part("layers", S, config.hidden_size, attention, last="mlp.down", appended=True), *([last] if cut else []))
