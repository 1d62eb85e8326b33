"""Write a source of pairs as ArrayRecord, for training and evaluation. After a kill, the same command continues.

After a change of the files, the same command prepares what changed: rows, and pictures that were replaced under their names.
"""

import argparse
import os
from pathlib import Path

from metaembed_jax.data import sources
from metaembed_jax.errors import UserError
from metaembed_jax.flags import count, local_path
from metaembed_jax.inputs.image_flags import add_image_flag, limit_images

EXAMPLES = """
  metaembed prepare --source=pairs --from=mine.jsonl --out=data        your own pairs; the source is called mine
  metaembed prepare --source=mmeb --from=MMEB-train --out=data         each of its subsets becomes a source
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    kinds = [f"{kind} (--from: {files})" for kind, (*_, files) in sources.READERS.items()]
    parser.add_argument("--source", required=True, help="; ".join([*sources.GENERATED, *kinds]))
    parser.add_argument("--from", dest="path", type=local_path, help="the files to read; not for generated sources")
    parser.add_argument("--out", type=local_path, default=Path("data"), help="the folder of all sources (default: data)")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="processes that read (default: one for each core)")
    parser.add_argument("--skip", type=count, default=0, help="most bad rows of a source to leave out (default: 0)")
    add_image_flag(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prepare a source, and print its counts."""
    limit_images(arguments)
    if arguments.source in sources.GENERATED:
        if arguments.path:
            raise UserError(f"--from: the source {arguments.source} is generated and reads no files; remove the flag")
        markers = {arguments.source: sources.prepare(arguments.source, arguments.out)}
    elif arguments.source in sources.READERS and arguments.path is None:
        raise UserError(f"--from is missing: {sources.READERS[arguments.source][-1]}")
    else:
        markers = sources.prepare_from(arguments.source, arguments.path, arguments.out, arguments.workers, arguments.skip)
    for name, marker in markers.items():
        shown = {key: len(value) if key == "left_out" else value for key, value in marker.items() if key != "files"}
        print(f"{arguments.out / name}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
        print(f"{arguments.out / name}: {sources.summary(name, arguments.out)}")
