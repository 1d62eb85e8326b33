"""Page retrieval in miniature: pages of 4 to 9 icons, and queries that name one or two. Starts from the `tiny` run and grows."""

from ml_collections import ConfigDict

from metaembed_jax.config import default_config, load_config


def get_config(arg=None):
    """No arguments."""
    del arg
    config = default_config()
    tiny = load_config("configs/tiny.py", {})
    config.name = "boards"
    config.init_from = "runs/tiny"
    with config.unlocked():
        config.architecture = ConfigDict(tiny.architecture.to_dict())
    config.architecture.vision_config.window_size = 112  # a page is 2x2 windows
    for key in ("dtype", "checkpoint_layers", "unroll_layers", "embedding_dim", "temperature"):
        config[key] = tiny[key]

    config.data.sources = (("boards", 1.0),)
    config.data.query_shapes = ((64, 0),)
    config.data.candidate_shapes = ((76, 256),)
    config.data.min_pixels = config.data.max_pixels = 224 * 224
    config.data.curriculum = ((150, 1, 1), (300, 1, 2), (550, 2, 4), (850, 3, 6), (0, 4, 9))
    config.batch_size = config.microbatch_size = 64
    config.steps = 1900
    config.optimizer.algorithm = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay = "cosine"
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.validate_every = config.save_every = 380
    return config
