"""What pyproject.toml cannot say: `configs/` is a package of the wheel, metaembed_jax/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["metaembed_jax*"]), "metaembed_jax.configs"],
    package_dir={"metaembed_jax.configs": "configs"},
)
