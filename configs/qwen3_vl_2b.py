"""The recipe of `configs/7b.py` on Qwen3-VL-2B, with its variants."""

from metaembed_jax.config import load_config, with_keys


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    base = load_config(f"qwen3_vl_8b:{arg or 'lora'}")
    return with_keys(
        base,
        {
            "name": base.name.replace("8b", "2b"),
            "init_from": "Qwen/Qwen3-VL-2B-Instruct",
            "model.architecture.text_config.hidden_size": 2048,
            "model.architecture.text_config.num_hidden_layers": 28,
            "model.architecture.text_config.num_attention_heads": 16,
            "model.architecture.text_config.intermediate_size": 6144,
            "model.architecture.vision_config.depth": 24,
            "model.architecture.vision_config.hidden_size": 1024,
            "model.architecture.vision_config.intermediate_size": 4096,
            "model.architecture.vision_config.out_hidden_size": 2048,
            "model.architecture.vision_config.deepstack_visual_indexes": (5, 11, 17),
            "rows.microbatch_rows": 8,
            "rows.recompute": "everything",
            "mesh.fsdp": 1,
        },
    )
