"""Icon search from scratch: a small Qwen2.5-VL learns to find a drawing by its name, in minutes on two CPU cores.

Meta Tokens need a backbone that knows something. Where the recipe takes a released one, `configs/tiny.py:base` makes one first: it
trains a single wide vector for each item, at half the cost of a step of all budgets.
"""

from metaembed_jax.config import (
    DataConfig,
    EvaluationConfig,
    MatryoshkaConfig,
    ModelSettings,
    ObjectivesConfig,
    OptimizerConfig,
    RowsConfig,
    RunConfig,
    ScheduleConfig,
)
from metaembed_jax.errors import UserError

ARCHITECTURE = dict(
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


def get_config(arg=None):
    """`base` is the first stage; without it, the second, which starts from it."""
    if arg not in (None, "base"):
        raise UserError(f"no stage {arg!r}: write tiny:base or tiny")
    is_base = arg == "base"
    steps = 2000 if is_base else 450
    return RunConfig(
        name="tiny_base" if is_base else "tiny",
        init_from="" if is_base else "tiny:base",
        model=ModelSettings(
            architecture=ARCHITECTURE,
            # In the second stage so few numbers that one vector cannot say all that the backbone knows, and more of them can.
            embedding_dim=64 if is_base else 8,
            meta_token_scale=1.0,  # as large as the states of so small a model
            dtype="float32",
        ),
        rows=RowsConfig(
            # An icon is 36 patches. With a query of mean length and all Meta Tokens it is 137 tokens, in the first stage 59.
            size=(64, 36) if is_base else (140, 36),
            batch_size=64,
            recompute="nothing",
            unroll_layers=3,
        ),
        data=DataConfig(
            sources=(("icons", 1.0, 0),),
            min_pixels=84 * 84,
            max_pixels=84 * 84,
            augment=True,  # or drawings are learned by heart
        ),
        objectives=ObjectivesConfig(
            matryoshka=MatryoshkaConfig(groups=((1, 1),), temperature=0.1) if is_base else MatryoshkaConfig(temperature=0.15)
        ),
        optimizer=OptimizerConfig(algorithm="muon", learning_rate=2e-3, warmup_steps=60, decay="cosine", b2=0.98, weight_decay=0.1),
        schedule=ScheduleConfig(steps=steps, save_every=steps // 5),
        evaluation=EvaluationConfig(validate_every=steps // 5),
    )
