"""The parts of Llama-3.2-Vision, for counting its arithmetic.

P patches and J images of a row, Q tokens of an image's tiles, filled up, T states of all images that text may look at, S tokens.
"""

from metaembed_jax.backbones.llama_vision.config import Config, TextConfig, VisionConfig
from metaembed_jax.backbones.llama_vision.vision import FILLED_TO
from metaembed_jax.backbones.parts import Attention, Part
from metaembed_jax.batch.packing import Size


def parts(config: Config, row: Size) -> tuple[Part, ...]:
    """See `backbones.parts`."""
    vision = config.vision_config
    T = row.patches // vision.tile_patches * (vision.tile_patches + 1)
    return (*(_vision(vision, row.patches, T) if row.patches else ()), *_language(config.text_config, row.tokens, T))


def _vision(config: VisionConfig, P: int, T: int) -> tuple[Part, ...]:
    J, Q = P // config.image_patches, config.max_num_tiles * FILLED_TO * -(-(config.tile_patches + 1) // FILLED_TO)
    # Heads have a number more, which keeps padding apart.
    heads = (config.attention_heads, config.attention_heads, config.hidden_size // config.attention_heads + 1)
    local, whole = (
        Attention(layers, J * Q, J * Q, Q, *heads, rotates=False) for layers in (config.num_hidden_layers, config.num_global_layers)
    )
    return (
        Part("vision.patch_embedding", P),
        *(Part(f"vision.{name}", 0) for name in ("before_tiles", "class_embedding", "position_embedding", "tile_positions")),
        Part("vision.norm_before", 0),
        Part("vision.layers", J * Q, config.hidden_size, (local,), last="mlp.down"),
        *(Part(f"vision.{name}", 0) for name in ("norm_after", "after_tiles")),
        Part("vision.global_layers", J * Q, config.hidden_size, (whole,), last="mlp.down", gate="vision.global_layers.mlp_gate"),
        Part("vision.projector", T),
    )


def _language(config: TextConfig, S: int, T: int) -> tuple[Part, ...]:
    heads = (config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    crossings = len(config.cross_attention_layers)
    over_text = Part(
        "layers",
        S,
        config.hidden_size,
        (Attention(config.num_hidden_layers - crossings, S, S, S, *heads),),
        last="mlp.down",
        gate="crossing.mlp_gate" if T else "",
        has_meta=True,
    )
    if not T:
        return (over_text,)
    over_image = over_text._replace(
        attention=(Attention(crossings, S, T, T, *heads, rotates=False),),
        other_positions={"key": T, "value": T},
        memory=("key", "value"),
    )
    return (over_text, over_image)
