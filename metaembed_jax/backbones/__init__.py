"""The families of backbones, by the `model_type` of their config.json."""

from metaembed_jax.backbones import qwen2_5_vl, qwen3_vl
from metaembed_jax.errors import UserError

FAMILIES = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def family(name: str):
    """The module of a family: `Config.from_huggingface`, `Backbone`, and `KEYS`, `UNUSED_KEYS`, `canonical_key` of its checkpoints.

    Raises:
      UserError: no such family.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"unknown backbone {name!r}: known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
