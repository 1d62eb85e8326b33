"""The kinds of config keys: fixed, free, and planned again."""

from metaembed_jax.config import FIXED_KEYS, FREE_KEYS, REPLANNED_KEYS, default_config, is_in


def keys(config, prefix=""):
    for key, value in config.items():
        yield from keys(value, f"{prefix}{key}.") if hasattr(value, "items") and value else [prefix + key]


def test_each_key_is_of_one_kind():
    config_keys = list(keys(default_config()))
    kinds = (FIXED_KEYS, FREE_KEYS, REPLANNED_KEYS)
    assert {key: sum(is_in(key, kind) for kind in kinds) for key in config_keys} == dict.fromkeys(config_keys, 1)
    for entry in (entry for kind in kinds for entry in kind):
        assert any(is_in(key, (entry,)) for key in config_keys), f"no config key {entry}"
