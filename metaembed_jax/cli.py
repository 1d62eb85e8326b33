"""`metaembed COMMAND`: one parser for all commands, also for `python -m metaembed_jax`, `train.py` and `eval.py`."""

import argparse
import importlib
from collections.abc import Sequence

from metaembed_jax import __version__
from metaembed_jax.config.files import CONFIGS, config_names
from metaembed_jax.errors import UserError
from metaembed_jax.flags import Parser, run_main, split_overrides

COMMANDS = {
    "train": "train a model, then evaluate its best checkpoint and export it",
    "eval": "evaluate a run on its test split, on MMEB, or on any benchmark of mteb",
    "prepare": "write a source of pairs, where training and evaluation read it",
    "mine": "find hard negatives of a source with a model, and write them as a source",
    "plan": "memory and time of a run on a TPU slice, without one",
    "check": "compare the results of this machine's devices with references, and time them",
    "export": "write a trained model for transformers, sentence-transformers or peft",
    "index": "encode documents into an index",
    "search": "search an index with a text, an image, or both",
    "calibrate": "choose the survivors of a search in stages, on a sample of queries",
    "upload": "give a collection of Qdrant the items of an index",
    "plot": "draw quality against budget of several runs",
}
TRAIN_PACKAGES = ("array_record", "grain", "importlib_resources", "matplotlib", "qtawesome", "tensorflow_datasets")
DESCRIPTION = "MetaEmbed in JAX: multimodal retrieval with nested sets of vectors."
EPILOG = """
from nothing to a search, in a few minutes on a CPU:
  metaembed train --config=smoke                               a small model of random weights, to show the path
  metaembed index --model=runs/smoke --input=FOLDER --out=INDEX
  metaembed search --index=INDEX "a red car"
  metaembed export --checkpoint=runs/smoke --format=transformers --out=exported

configs (--config=NAME, or --config=FILE.py of your own):
  {names}
  they are in {folder}

metaembed COMMAND --help lists the flags of a command.
"""


def main(argv: Sequence[str]) -> None:
    """Parse flags, and run their command.

    Raises:
      UserError: an unknown flag or command, or an error of the command.
    """
    overrides, rest = split_overrides(argv)
    arguments = make_parser(rest[0] if rest else "").parse_args(rest)
    if overrides and "config" not in arguments:
        raise UserError(f"{arguments.command} takes no --config.{next(iter(overrides))}; see --help")
    arguments.overrides = overrides
    arguments.run(arguments)


def make_parser(name: str) -> Parser:
    """Return the parser of all commands; only the command `name` has its flags."""
    epilog = EPILOG.format(names=", ".join(config_names()), folder=CONFIGS)
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser("metaembed", description=DESCRIPTION, epilog=epilog, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"metaembed_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for command, summary in COMMANDS.items():
        if command != name:
            commands.add_parser(command, help=summary)
            continue
        module = _import_command(command)
        examples = f"examples:{module.EXAMPLES}"
        chosen = commands.add_parser(command, help=summary, description=module.__doc__, epilog=examples, formatter_class=layout)
        module.add_flags(chosen)
        chosen.set_defaults(run=module.run)
    return parser


def _import_command(name: str):
    try:
        return importlib.import_module(f"metaembed_jax.commands.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_PACKAGES:
            raise
        raise UserError(f"metaembed {name} needs {error.name}: pip install 'metaembed-jax[train]'") from error


def run(command: str = "") -> None:
    """Run the command line, or `command` with its flags."""
    run_main(lambda argv: main([command, *argv] if command else argv))
