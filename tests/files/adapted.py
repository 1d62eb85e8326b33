"""`smoke`, shorter: adapters on a frozen base, eight steps. The argument is where the base is made."""

from metaembed_jax.config import load_config


def get_config(arg=None):
    config = load_config(f"configs/smoke.py:{arg}", {})
    config.name, config.exports = "adapted", ()
    config.steps, config.optimizer.warmup_steps, config.log_every = 8, 2, 1
    config.validate_every, config.save_every = 8, 2
    return config
