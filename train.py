"""Trains a MetaEmbed: `python train.py --config=configs/tiny.py`. Run again, it goes on where it stopped.

SIGTERM saves and ends it with exit code 143, which tells schedulers to start it again.
"""

from collections.abc import Sequence

from metaembed_jax import hosts
from metaembed_jax.checkpoints.workdir import default_workdir
from metaembed_jax.config import load_config
from metaembed_jax.flags import Parser, any_path, parse, run_main
from metaembed_jax.startup import add_device_flags, add_host_flags, start
from metaembed_jax.training.loop import train
from metaembed_jax.votes import TERMINATED


def main(argv: Sequence[str]) -> None:
    """Flags in, one call out."""
    parser = Parser(prog="train.py", description=__doc__)
    parser.add_argument("--workdir", type=any_path, help="the folder of the run; runs/<config name> by default")
    add_device_flags(parser)
    add_host_flags(parser)
    arguments = parse(parser, argv)
    start(arguments)
    with hosts.speaking_once():
        config = load_config(arguments.config, arguments.overrides)
        finished = train(config, arguments.workdir or default_workdir(config))
    if not finished:
        hosts.leave(TERMINATED)


if __name__ == "__main__":
    run_main(main)
