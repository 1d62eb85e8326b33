"""Page retrieval in miniature: pages of 4 to 9 icons, and queries that name one or two. It starts from the `tiny` run and grows.

configs/tiny.py          icons in the middle of the picture
configs/boards.py:one    one icon, at any place of a small page
configs/boards.py        more and more icons, up to 4 to 9 on a page

Each starts from the one before, which is trained first.
"""

import dataclasses

from metaembed_jax.config import (
    DataConfig,
    EvaluationConfig,
    RunConfig,
    ScheduleConfig,
    load_config,
    with_keys,
)
from metaembed_jax.errors import UserError


def get_config(arg=None):
    """`one` is the first stage; without it, the second."""
    if arg not in (None, "one"):
        raise UserError(f"no stage {arg!r}: write boards:one or boards")
    is_one, tiny = arg == "one", load_config("tiny")
    steps, side = (400, 112) if is_one else (2000, 224)
    return RunConfig(
        name="boards_one" if is_one else "boards",
        init_from="tiny" if is_one else "boards:one",
        model=with_keys(tiny.model, {"architecture.vision_config.window_size": 112, "embedding_dim": 32}),
        rows=dataclasses.replace(tiny.rows, size=(152, 64) if is_one else (216, 256)),
        data=DataConfig(
            sources=(("boards", 1.0, 0),),
            min_pixels=side**2,
            max_pixels=side**2,
            page_side=side,
            curriculum=((0, 1, 1),) if is_one else ((150, 1, 2), (400, 2, 4), (700, 3, 6), (0, 4, 9)),
        ),
        objectives=tiny.objectives,
        optimizer=tiny.optimizer,
        schedule=ScheduleConfig(steps=steps, save_every=steps // 4),
        evaluation=EvaluationConfig(validate_every=steps // 4),
    )
