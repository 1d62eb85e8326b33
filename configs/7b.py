"""MetaEmbed-7B: the published recipe (arXiv 2509.18095 and its release) on Qwen2.5-VL-7B.

`configs/7b.py` or `configs/7b.py:lora` trains adapters, Meta Tokens and head; `configs/7b.py:full` trains everything.
"""

from metaembed_jax.config import (
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelSettings,
    OptimizerConfig,
    RowsConfig,
    RunConfig,
    ScheduleConfig,
)
from metaembed_jax.errors import UserError

ARCHITECTURE = dict(
    text_config=dict(
        vocab_size=152064,
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        mrope_section=(16, 24, 24),
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
    vision_config=dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
        fullatt_block_indexes=(7, 15, 23, 31),
    ),
)

LORA = (
    ("meta_tokens", "full"),
    ("head.*", "full"),
    ("backbone.layers.*.kernel", "lora"),
    ("backbone.vision.blocks.mlp.*.kernel", "lora"),
)

# (name, weight, at most so many of its pairs; 0: all)
SOURCES = (
    *((name, 5.0, 0) for name in ("colpali", "visrag")),
    ("MSCOCO", 2.0, 100_000),
    *((name, 1.0, 100_000) for name in ("ImageNet_1K", "MSCOCO_i2t", "MSCOCO_t2i", "VisualNews_i2t", "VisualNews_t2i")),
    *(
        (name, 1.0, 50_000)
        for name in "A-OKVQA CIRR ChartQA DocVQA InfographicsVQA N24News VisDial Visual7W WebQA ArxivQA InfoSeek_it2it "
        "InfoSeek_it2t TAT-DQA".split()
    ),
    ("NIGHTS", 0.5, 50_000),
    *((name, 0.5, 10_000) for name in ("HatefulMemes", "OK-VQA", "SUN397", "VOC2007")),
)


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    if arg not in (None, "lora", "full"):
        raise UserError(f"no variant {arg!r}: write lora or full")
    is_full = arg == "full"
    return RunConfig(
        name="7b_full" if is_full else "7b",
        init_from="Qwen/Qwen2.5-VL-7B-Instruct",
        model=ModelSettings(architecture=ARCHITECTURE, trained=(("*", "full"),) if is_full else LORA),
        rows=RowsConfig(size=(2432, 8192), batch_size=384, microbatch_rows=128),
        data=DataConfig(sources=SOURCES, sub_batch=32, negatives=1, workers=4),
        optimizer=OptimizerConfig(learning_rate=1e-5 if is_full else 1e-4),
        mesh=MeshConfig(fsdp=8),
        schedule=ScheduleConfig(steps=4000, save_every=500),
        evaluation=EvaluationConfig(validate_every=500),
    )
