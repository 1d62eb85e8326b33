"""`smoke`, shorter: adapters on a frozen base, eight steps. The argument is where the base is made."""

from metaembed_jax.config import load_config, with_keys


def get_config(arg=None):
    return with_keys(
        load_config(f"configs/smoke.py:{arg}"),
        {
            "name": "adapted",
            "optimizer.warmup_steps": 2,
            "schedule.steps": 8,
            "schedule.log_every": 1,
            "schedule.save_every": 2,
            "schedule.exports": (),
            "evaluation.validate_every": 8,
        },
    )
