"""Make `configs/` a package of the wheel, metaembed_jax/configs: pyproject.toml has no word for it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["metaembed_jax*"]), "metaembed_jax.configs"],
    package_dir={"metaembed_jax.configs": "configs"},
)
