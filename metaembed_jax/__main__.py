"""`python -m metaembed_jax`."""

from metaembed_jax.cli import run

run()
