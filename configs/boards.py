"""Page retrieval in miniature: pages of 4 to 9 icons, and queries that name one or two. It starts from the `tiny` run and grows.

configs/tiny.py          icons in the middle of the picture
configs/boards.py:one    one icon, at any place of a small page
configs/boards.py        more and more icons, up to 4 to 9 on a page

Each starts from the one before, which is trained first.
"""

from ml_collections import ConfigDict

from metaembed_jax.config import default_config, load_config
from metaembed_jax.errors import UserError


def get_config(arg=None):
    """`one` is the first stage; without it, the second."""
    if arg not in (None, "one"):
        raise UserError(f"no stage {arg!r}: write boards:one or boards")
    config = default_config()
    tiny = load_config("tiny", {})
    with config.unlocked():
        config.architecture = ConfigDict(tiny.architecture.to_dict())
    config.architecture.vision_config.window_size = 112
    for key in ("dtype", "recompute", "unroll_layers", "meta_token_scale", "temperature", "optimizer"):
        config[key] = tiny[key]
    config.embedding_dim = 32

    config.data.sources = (("boards", 1.0, 0),)
    config.batch_size = 64
    if arg == "one":
        config.name, config.init_from = "boards_one", "tiny"
        config.data.page_side, config.data.curriculum = 112, ((0, 1, 1),)
        config.row, config.steps = (152, 64), 400
    else:
        config.name, config.init_from = "boards", "boards:one"
        config.data.page_side, config.data.curriculum = 224, ((150, 1, 2), (400, 2, 4), (700, 3, 6), (0, 4, 9))
        config.row, config.steps = (216, 256), 2000
    config.data.min_pixels = config.data.max_pixels = config.data.page_side**2
    config.validate_every = config.save_every = config.steps // 4
    return config
