"""MetaEmbed-11B: the recipe of `configs/7b.py` on Llama-3.2-Vision-11B, with its variants.

An image is no part of the sequence and takes 4 tiles of 560 pixels, whatever its size; `config.data.max_pixels` says nothing here.
"""

from metaembed_jax.config import load_config, with_keys

LORA = (
    ("meta_tokens", "full"),
    ("head.*", "full"),
    ("backbone.layers.*.kernel", "lora"),
    ("backbone.vision.layers.mlp.*.kernel", "lora"),
    ("backbone.vision.global_layers.mlp.*.kernel", "lora"),
)

ARCHITECTURE = dict(
    text_config=dict(
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        cross_attention_layers=(3, 8, 13, 18, 23, 28, 33, 38),
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    vision_config=dict(
        hidden_size=1280,
        num_hidden_layers=32,
        num_global_layers=8,
        attention_heads=16,
        intermediate_size=5120,
        vision_output_dim=7680,
        image_size=560,
        intermediate_layers_indices=(3, 7, 15, 23, 30),
        max_num_tiles=4,
    ),
)


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    base = load_config(f"7b:{arg or 'lora'}")
    return with_keys(
        base,
        {
            "name": base.name.replace("7b", "llama_vision_11b"),
            "init_from": "meta-llama/Llama-3.2-11B-Vision-Instruct",
            "model.backbone": "mllama",
            "model.architecture": ARCHITECTURE,
            "model.trained": base.model.trained if arg == "full" else LORA,
            "rows.size": (512, 12800),  # two images
            "rows.microbatch_rows": 16,
            "rows.recompute": "everything",
        },
    )
