"""`python -m metaembed_jax COMMAND`: what is neither training nor evaluation."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.check import command as checking
from metaembed_jax.checkpoints.export import FORMATS, export
from metaembed_jax.config import load_config
from metaembed_jax.data import sources
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation import report
from metaembed_jax.files import write_bytes
from metaembed_jax.flags import Parser, add_config, any_path, local_path, model_name, run_main, split_overrides
from metaembed_jax.planning import command as planning
from metaembed_jax.retrieval import command as retrieval
from metaembed_jax.retrieval.manifest import DTYPES
from metaembed_jax.startup import add_device_flags, start


def main(argv: Sequence[str]) -> None:
    """Flags in, one call out."""
    parser = Parser(prog="python -m metaembed_jax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write a source as ArrayRecord, where training and evaluation read it")
    kinds = [f"{kind} (--from: {about})" for kind, (*_, about) in sources.READERS.items()]
    prepare.add_argument("--source", required=True, help="; ".join([*sources.GENERATED, *kinds]))
    prepare.add_argument("--from", dest="path", type=local_path, help="the files to read; none for a source that is generated")
    prepare.add_argument("--out", type=local_path, default=Path("data"), help="the folder of all sources (default: data)")
    prepare.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes to read with (default: one a core)")
    prepare.add_argument("--skip", type=_count, default=0, help="bad rows of a source to leave out before an error (default: 0)")
    prepare.set_defaults(run=_prepare)
    plot = commands.add_parser("plot", help="draw quality against budget of several runs in one picture")
    plot.add_argument("results", type=any_path, nargs="+", help="results.json of train.py or eval.py, one for each line")
    plot.add_argument("--out", type=any_path, default=Path("quality.png"), help="the picture (default: quality.png)")
    plot.set_defaults(run=_plot)
    out = commands.add_parser("export", help="write a trained model for transformers, sentence-transformers or peft")
    out.add_argument("--checkpoint", type=model_name, required=True, help="a run of train.py, or a Hugging Face directory")
    out.add_argument("--out", type=any_path, required=True, help="a folder that is empty or not there yet")
    out.add_argument("--format", required=True, choices=tuple(FORMATS), help="whose format")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: the one it was trained in)")
    out.set_defaults(run=_export)
    plan = commands.add_parser("plan", help="what a run needs of a TPU slice, and how fast that can be; needs no TPU")
    plan.add_argument("--topology", required=True, help="the slice, such as v5e:2x4, or slices, such as 2xv5e:2x4")
    plan.add_argument("--what", choices=("train", "encode", "search"), default="train", help="the program (default: train)")
    plan.add_argument("--search", action="store_true", help="find the mesh and microbatch that train fastest")
    plan.add_argument("--json", action="store_true", help="print JSON")
    add_config(plan)
    plan.set_defaults(run=_plan)
    check = commands.add_parser("check", help="compare what this machine's devices compute with references, and time it")
    check.add_argument("--only", default="", metavar="WORDS", help="run the lines that have this in their name")
    check.add_argument("--json", action="store_true", help="print JSON on stdout, and the table on stderr")
    add_config(check, required=False)
    check.set_defaults(run=_check)
    index = commands.add_parser("index", help="encode what is to be searched; killed and run again, it goes on where it was")
    index.add_argument("--model", type=model_name, required=True, help="a run of train.py, a Hugging Face directory, or a hub id")
    index.add_argument("--input", type=local_path, required=True, help="a folder of images and PDF files, or a .jsonl or .parquet")
    index.add_argument("--out", type=local_path, required=True, help="the index; one that is there is replaced in the end")
    index.add_argument("--budget", type=int, help="vectors to keep of each item (default: all)")
    index.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the vectors on disk (default: bfloat16)")
    index.set_defaults(run=_index)
    search = commands.add_parser("search", help="find what fits a text, an image, or both")
    search.add_argument("--index", type=local_path, required=True, help="what the command `index` wrote")
    search.add_argument("query", nargs="?", help="a text")
    search.add_argument("--image", type=local_path, help="a file")
    search.add_argument("--budget", help="such as 4:8, or stages, 1:1:1000>16:64 (default: all vectors)")
    search.add_argument("-k", type=int, help="how many to show (default: 10)")
    search.add_argument("--model", type=model_name, help="where the index's model is now (default: where it was)")
    search.set_defaults(run=_search)
    for command in (out, check, index, search):
        add_device_flags(command)
    overrides, rest = split_overrides(argv)
    arguments = parser.parse_args(rest)
    if overrides and "config" not in arguments:
        raise UserError(f"{arguments.command} takes no --config.{next(iter(overrides))}; see --help")
    arguments.overrides = overrides
    if "cpu" in arguments:
        start(arguments)
    arguments.run(arguments)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{text!r} is no number of 0 or more")
    return int(text)


def _prepare(arguments: Namespace) -> None:
    if arguments.source in sources.GENERATED:
        if arguments.path:
            raise UserError(f"--from: the source {arguments.source} is generated, and reads no files; leave it out")
        markers = {arguments.source: sources.prepare(arguments.source, arguments.out)}
    elif arguments.path is None and arguments.source in sources.READERS:
        raise UserError(f"--from is missing: {sources.READERS[arguments.source][-1]}")
    else:
        markers = sources.prepare_from(arguments.source, arguments.path, arguments.out, arguments.workers, arguments.skip)
    for name, marker in markers.items():
        print(f"{arguments.out / name}: " + ", ".join(f"{key} {value}" for key, value in marker.items()))
        print(f"{arguments.out / name}: {sources.summary(name, arguments.out)}")


def _plot(arguments: Namespace) -> None:
    found = [report.read_results(path) for path in arguments.results]
    write_bytes(arguments.out, report.picture([(results["config"]["name"], results) for results in found]))
    print(f"written: {arguments.out}")


def _export(arguments: Namespace) -> None:
    export(arguments.checkpoint, arguments.out, arguments.format, arguments.dtype)
    print(f"written: {arguments.out}")


def _plan(arguments: Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    if not planning.plan(config, arguments.topology, arguments.what, arguments.search, arguments.json):
        sys.exit(1)


def _check(arguments: Namespace) -> None:
    if arguments.overrides and not arguments.config:
        raise UserError(f"--config.{next(iter(arguments.overrides))} changes a config: add --config=FILE")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    if not checking.check(config, arguments.only, arguments.json):
        sys.exit(1)


def _index(arguments: Namespace) -> None:
    retrieval.index(arguments.model, arguments.input, arguments.out, arguments.budget, arguments.dtype)


def _search(arguments: Namespace) -> None:
    retrieval.search(arguments.index, arguments.query, arguments.image, arguments.budget, arguments.k, arguments.model)


def run() -> None:
    """The entry point."""
    run_main(main)
