"""`tiny`, narrow and with small batches: eight steps in a few seconds."""

from pathlib import Path

from metaembed_jax.config import load_config, with_keys


def get_config(arg=None):
    """`first` has another head, and is what a second stage can start from."""
    base = load_config(str(Path(__file__).parents[2] / "configs" / "tiny.py"))
    text = {"hidden_size": 32, "intermediate_size": 64, "mrope_section": (2, 3, 3)}
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    config = with_keys(
        base,
        {
            "name": "small",
            "init_from": "",
            **{f"model.architecture.text_config.{key}": value for key, value in text.items()},
            **{f"model.architecture.vision_config.{key}": value for key, value in vision.items()},
            "model.embedding_dim": 16,
            "rows.batch_size": 16,
            "rows.unroll_layers": 1,
            "objectives.matryoshka.temperature": 0.03,
            "optimizer.warmup_steps": 2,
            "schedule.steps": 8,
            "schedule.log_every": 1,
            "schedule.save_every": 2,
            "evaluation.validate_every": 8,
        },
    )
    if arg != "first":
        return config
    return with_keys(config, {"name": "small_first", "model.embedding_dim": 24, "objectives.matryoshka.groups": ((1, 1),)})
