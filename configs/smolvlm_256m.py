"""MetaEmbed on SmolVLM-256M, the smallest of the backbones: the recipe of `configs/7b.py`, with its variants.

Pages are up to three tiles of 512 pixels on a side, and the whole page as one more: 640 visual tokens of 10,240 patches.
"""

from metaembed_jax.config import load_config, with_keys

ARCHITECTURE = dict(
    scale_factor=4,
    text_config=dict(
        vocab_size=49280,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
    ),
    vision_config=dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        image_size=512,
        patch_size=16,
    ),
)


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    base = load_config(f"7b:{arg or 'lora'}")
    return with_keys(
        base,
        {
            "name": base.name.replace("7b", "smolvlm_256m"),
            "init_from": "HuggingFaceTB/SmolVLM-256M-Instruct",
            "model.backbone": "idefics3",
            "model.architecture": ARCHITECTURE,
            "rows.size": (),  # the family's
            "rows.microbatch_rows": 1,
            "rows.recompute": "everything",
            "data.max_pixels": (3 * 512) ** 2,
            "mesh.fsdp": 1,
        },
    )
