"""Train a model. After a stop, the same command continues from the latest checkpoint.

SIGTERM saves a checkpoint and ends the command with exit code 143, so that a scheduler starts it again.
"""

import argparse

from metaembed_jax.checkpoints.workdir import default_workdir
from metaembed_jax.config.files import load_config
from metaembed_jax.flags import add_config, any_path
from metaembed_jax.hosts.failures import fail_together, leave
from metaembed_jax.hosts.votes import TERMINATED
from metaembed_jax.inputs.image_flags import add_image_flag
from metaembed_jax.startup import add_device_flags, add_host_flags, start
from metaembed_jax.training.loop import train

EXAMPLES = """
  metaembed train --config=smoke                                       a minute, from random weights to all exports
  metaembed train --config=tiny --config.seed=1                        a key of the config changed
  metaembed train --config=7b:full --workdir=gs://BUCKET/7b            on every host of a TPU slice
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_config(parser)
    parser.add_argument("--workdir", type=any_path, help="the folder of the run (default: runs/<config.name>)")
    add_image_flag(parser)
    add_device_flags(parser)
    add_host_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train until the last step or a signal."""
    start(arguments)
    with fail_together():
        config = load_config(arguments.config, arguments.overrides)
        finished = train(config, arguments.workdir or default_workdir(config.name))
    if not finished:
        leave(TERMINATED)
