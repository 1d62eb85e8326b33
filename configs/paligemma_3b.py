"""MetaEmbed on PaliGemma-3B at 448 pixels: the recipe of `configs/7b.py`, with its variants."""

from metaembed_jax.config import load_config


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    config = load_config(f"7b:{arg or 'lora'}", {})
    config.name = config.name.replace("7b", "paligemma_3b")
    config.init_from = "google/paligemma-3b-pt-448"
    config.backbone = "paligemma"
    with config.unlocked():
        config.architecture = dict(
            text_config=dict(
                model_type="gemma",
                vocab_size=257216,
                hidden_size=2048,
                num_hidden_layers=18,
                num_attention_heads=8,
                num_key_value_heads=1,
                intermediate_size=16384,
            ),
            vision_config=dict(
                hidden_size=1152,
                num_hidden_layers=27,
                num_attention_heads=16,
                intermediate_size=4304,
                image_size=448,
                patch_size=14,
            ),
        )
    config.microbatch_rows, config.recompute, config.mesh.fsdp = 8, "everything", 1
    config.row = ()  # the family's
    return config
