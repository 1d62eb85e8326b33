"""The recipe of `configs/7b.py` on Qwen3-VL-8B, with its variants."""

from metaembed_jax.config import load_config, with_keys

ARCHITECTURE = dict(
    text_config=dict(
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
        mrope_section=(24, 20, 20),
        rms_norm_eps=1e-6,
        rope_theta=5e6,
    ),
    vision_config=dict(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        out_hidden_size=4096,
        deepstack_visual_indexes=(8, 16, 24),
    ),
)


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    base = load_config(f"7b:{arg or 'lora'}")
    return with_keys(
        base,
        {
            "name": base.name.replace("7b", "qwen3_vl_8b"),
            "init_from": "Qwen/Qwen3-VL-8B-Instruct",
            "model.backbone": "qwen3_vl",
            "model.architecture": ARCHITECTURE,
            "rows.size": (2560, 8192),
            "data.min_pixels": 32 * 32,  # a visual token is 32x32 pixels, 4 patches
            "data.max_pixels": 1024 * 32 * 32,
        },
    )
