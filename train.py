"""`python train.py --config=tiny`, which is `metaembed train --config=tiny`."""

from metaembed_jax.cli import run

if __name__ == "__main__":
    run("train")
