"""Each key of a config is of one kind."""

from metaembed_jax.config import FIXED_KEYS, FREE_KEYS, REPLANNED_KEYS, default_config, is_in


def keys(config, prefix=""):
    for key, value in config.items():
        yield from keys(value, f"{prefix}{key}.") if hasattr(value, "items") and value else [prefix + key]


def test_each_key_is_of_one_kind():
    known = list(keys(default_config()))
    kinds = (FIXED_KEYS, FREE_KEYS, REPLANNED_KEYS)
    assert {key: sum(is_in(key, kind) for kind in kinds) for key in known} == dict.fromkeys(known, 1)
    for key in (key for kind in kinds for key in kind):
        assert any(is_in(other, (key,)) for other in known), f"{key} is no key"
