"""`python -m metaembed_jax COMMAND`: what is neither training nor evaluation."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.checkpoints.export import FORMATS, export
from metaembed_jax.data import sources
from metaembed_jax.evaluation import report
from metaembed_jax.flags import Parser, run_main


def main(argv: Sequence[str]) -> None:
    """Flags in, one call out."""
    parser = Parser(prog="python -m metaembed_jax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write a source as ArrayRecord, where training and evaluation read it")
    prepare.add_argument("--source", required=True, help=f"one of {', '.join(sources.SOURCES)}")
    prepare.add_argument("--out", type=Path, default=Path("data"), help="the folder of all sources (default: data)")
    prepare.set_defaults(run=_prepare)
    plot = commands.add_parser("plot", help="draw quality against budget of several runs in one picture")
    plot.add_argument("results", type=Path, nargs="+", help="results.json of train.py or eval.py, one for each line")
    plot.add_argument("--out", type=Path, default=Path("quality.png"), help="the picture (default: quality.png)")
    plot.set_defaults(run=_plot)
    out = commands.add_parser("export", help="write a trained model for transformers, sentence-transformers or peft")
    out.add_argument("--checkpoint", required=True, help="a run of train.py, or a Hugging Face directory")
    out.add_argument("--out", type=Path, required=True, help="a folder that is empty or not there yet")
    out.add_argument("--format", required=True, choices=tuple(FORMATS), help="whose format")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: the one it was trained in)")
    out.set_defaults(run=_export)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def _prepare(arguments: Namespace) -> None:
    marker = sources.prepare(arguments.source, arguments.out)
    print(f"{arguments.out / arguments.source}: " + ", ".join(f"{key} {value}" for key, value in marker.items()))


def _plot(arguments: Namespace) -> None:
    found = [report.read_results(path) for path in arguments.results]
    report.plot(arguments.out, [(results["config"]["name"], results) for results in found])
    print(f"written: {arguments.out}")


def _export(arguments: Namespace) -> None:
    export(arguments.checkpoint, arguments.out, arguments.format, arguments.dtype)
    print(f"written: {arguments.out}")


def run() -> None:
    """The entry point."""
    run_main(main)
