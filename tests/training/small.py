"""`tiny`, narrow and with small batches: eight steps in a few seconds."""

from pathlib import Path

from metaembed_jax.config import load_config


def get_config(arg=None):
    """`first` has another head, and is what a second stage can start from."""
    config = load_config(str(Path(__file__).parents[2] / "configs" / "tiny.py"), {})
    config.name, config.init_from = "small", ""
    text, vision = config.architecture.text_config, config.architecture.vision_config
    text.hidden_size, text.intermediate_size, text.mrope_section = 32, 64, (2, 3, 3)
    vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 32, 64, 32
    config.embedding_dim, config.unroll_layers, config.temperature = 16, 1, 0.03
    if arg == "first":
        config.name, config.embedding_dim, config.groups = "small_first", 24, ((1, 1),)
    config.batch_size = 16
    config.steps, config.optimizer.warmup_steps, config.log_every = 8, 2, 1
    config.validate_every, config.save_every = 8, 2
    return config
