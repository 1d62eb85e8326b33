"""Icon search from scratch: a small Qwen2.5-VL learns to find a drawing by its name, in minutes on two CPU cores."""

from metaembed_jax.config import default_config


def get_config(arg=None):
    """No arguments."""
    del arg
    config = default_config()
    config.name = "tiny"
    config.dtype = "float32"
    config.checkpoint_layers = False
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
    config.embedding_dim = 12  # 8 is worse on validation
    # From scratch, Meta Tokens that start far apart become different vectors, and a temperature of 0.03 is too steep: over it, a
    # sum of 16 similarities falls at once to the one loss that needs no learning, all vectors equal.
    config.meta_token_scale = 1.0
    config.temperature = 0.15

    config.data.sources = (("icons", 1.0, 0),)
    config.data.query_shapes = ((32, 0),)
    config.data.candidate_shapes = ((21, 36),)
    config.data.min_pixels = config.data.max_pixels = 84 * 84
    config.data.augment = True  # or drawings are learned by heart, and more vectors gain nothing on new ones

    config.batch_size = config.microbatch_size = 64
    config.steps = 1500
    config.optimizer.algorithm = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 60
    config.optimizer.decay = "cosine"
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.validate_every = config.save_every = 300
    return config
