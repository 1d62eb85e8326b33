"""The recipe of `configs/7b.py` on Qwen3-VL-2B, with its variants."""

from metaembed_jax.config import load_config


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    config = load_config(f"qwen3_vl_8b:{arg or 'lora'}", {})
    config.name = config.name.replace("8b", "2b")
    config.init_from = "Qwen/Qwen3-VL-2B-Instruct"
    text, vision = config.architecture.text_config, config.architecture.vision_config
    text.hidden_size = vision.out_hidden_size = 2048
    text.num_hidden_layers, text.num_attention_heads, text.intermediate_size = 28, 16, 6144
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.deepstack_visual_indexes = 24, 1024, 4096, (5, 11, 17)
    config.microbatch_rows, config.recompute, config.mesh.fsdp = 8, "everything", 1
    return config
