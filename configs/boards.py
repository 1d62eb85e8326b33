"""Page retrieval in miniature: pages of 4 to 9 icons, and queries that name one or two. It starts from the `tiny` run and grows.

configs/tiny.py          icons in the middle of the picture
configs/boards.py:one    one icon, at any place of a small page
configs/boards.py        more and more icons, up to 4 to 9 on a page

Each starts from the one before, which is trained first.

`boards:one_states` and `boards:states` are the baseline of nested vectors: from the same `tiny` run, by the same steps and pages,
all token states are trained as vectors, and those of a document are pooled to 1, 4, 16 or 64.
"""

import dataclasses

from metaembed_jax.config import (
    AllStatesConfig,
    DataConfig,
    EvaluationConfig,
    ObjectivesConfig,
    RunConfig,
    ScheduleConfig,
    load_config,
    with_keys,
)
from metaembed_jax.errors import UserError


def get_config(arg=None):
    """`one` is the first stage; without it, the second; `one_states` and `states` are the stages of the baseline."""
    if arg not in (None, "one", "one_states", "states"):
        raise UserError(f"unknown stage {arg!r}; allowed: boards:one, boards, boards:one_states, boards:states")
    reads_states, is_one, tiny = arg in ("one_states", "states"), arg in ("one", "one_states"), load_config("tiny")
    steps, side = (400, 112) if is_one else (2000, 224)
    config = RunConfig(
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
    return _with_states(config, document_tokens=27 if is_one else 75) if reads_states else config


def _with_states(config, document_tokens):
    """Return a stage that reads the states at all tokens of a prompt and its template, as ColPali does, without Meta Tokens.

    Args:
      document_tokens: of a page.
    """
    query_tokens = 48  # more than two names have
    pooled = [vectors for vectors in (1, 4, 16, 64) if vectors < document_tokens]
    tokens = {"readout": "states", "query_tokens": query_tokens, "document_tokens": document_tokens}
    return dataclasses.replace(
        config,
        name=f"{config.name}_states",
        init_from=config.init_from.replace("boards:one", "boards:one_states"),
        model=with_keys(config.model, tokens),
        rows=dataclasses.replace(config.rows, size=(document_tokens + 37, config.rows.size[1])),  # a page and nearly any query
        objectives=ObjectivesConfig(
            matryoshka=None,
            all_states=AllStatesConfig(evaluated=tuple((query_tokens, vectors) for vectors in (*pooled, document_tokens))),
        ),
    )
