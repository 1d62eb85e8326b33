"""Icon search from scratch: a small Qwen2.5-VL learns to find a drawing by its name, in minutes on two CPU cores.

Meta Tokens need a backbone that knows something. Where the recipe takes a released one, `configs/tiny.py:base` makes one first: it
trains a single wide vector for each item, at half the cost of a step of all budgets.
"""

from metaembed_jax.config import default_config
from metaembed_jax.errors import UserError


def get_config(arg=None):
    """`base` is the first stage; without it, the second, which starts from it."""
    if arg not in (None, "base"):
        raise UserError(f"no stage {arg!r}: write tiny:base or tiny")
    config = default_config()
    config.dtype = "float32"
    config.recompute = "nothing"
    config.unroll_layers = 3
    with config.unlocked():
        config.architecture = dict(
            text_config=dict(
                vocab_size=2048,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=384,
                mrope_section=(8, 12, 12),
                rope_theta=10000.0,
            ),
            vision_config=dict(
                hidden_size=128,
                depth=3,
                num_heads=2,
                intermediate_size=384,
                out_hidden_size=128,
                fullatt_block_indexes=(1,),
                window_size=84,
            ),
        )
    if arg == "base":
        config.name, config.groups, config.embedding_dim, config.temperature = "tiny_base", ((1, 1),), 64, 0.1
        config.steps = 2000
    else:
        # So few numbers that one vector cannot say all that the backbone knows, and more of them can.
        config.name, config.init_from, config.embedding_dim, config.temperature = "tiny", "tiny:base", 8, 0.15
        config.steps = 450
    config.meta_token_scale = 1.0  # as large as the states of so small a model

    config.data.sources = (("icons", 1.0, 0),)
    config.data.min_pixels = config.data.max_pixels = 84 * 84
    config.data.augment = True  # or drawings are learned by heart

    # An icon is 36 patches. With a query of mean length and all Meta Tokens it is 137 tokens, with those of the first stage 59.
    config.row = (64, 36) if arg == "base" else (140, 36)
    config.batch_size = 64
    config.optimizer.algorithm = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 60
    config.optimizer.decay = "cosine"
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.validate_every = config.save_every = config.steps // 5
    return config
