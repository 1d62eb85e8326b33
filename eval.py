"""`python eval.py --config=tiny --checkpoint=runs/tiny`, which is `metaembed eval` of the same flags."""

from metaembed_jax.cli import run

if __name__ == "__main__":
    run("eval")
