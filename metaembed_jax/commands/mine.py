"""Mine hard negatives of a source with a model, and write them as a source. After a kill, the same command continues.

The training documents of a source are encoded into an index, and its training queries search it. Of the best documents of a query,
those that answer it are left out: the positives of all pairs with an equal query, and documents with the same content. A document
within a margin of the positive's score may answer the query too, and is left out. The next ones are the negatives of the pair; they
replace those that it has. The validation and test splits stay as they are.
"""

import argparse
from pathlib import Path

from metaembed_jax.flags import count, local_path, model_name
from metaembed_jax.hosts.failures import fail_together
from metaembed_jax.hosts.votes import stop_signal
from metaembed_jax.inputs.image_flags import add_image_flag
from metaembed_jax.mining.mine import mine_source
from metaembed_jax.mining.selection import Selection
from metaembed_jax.startup import add_device_flags, add_host_flags, add_mesh_flags, mesh_sizes, start

EXAMPLES = """
  metaembed mine --model=runs/tiny --source=icons --out=icons-mined
  metaembed mine --model=runs/7b --source=mine --out=mine-hard --negatives=8 --range-min=10 --budget=1:1:1000>16:64
  metaembed train --config=tiny --config.data.sources='(("icons-mined", 1.0, 0),)' --config.data.negatives=4
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--model", type=model_name, required=True, help="a run, a Hugging Face directory, or a hub id")
    parser.add_argument(
        "--source", required=True, help="the prepared source; for boards, the pages of 8 epochs are mined, as a fixed set"
    )
    parser.add_argument("--out", required=True, help="the name of the source that is written")
    parser.add_argument("--data", type=local_path, default=Path("data"), help="the folder of all sources (default: data)")
    rules = parser.add_argument_group(
        "rules", "the defaults are NV-Retriever's best, TopK-PercPos at 95 %, in the window of sentence-transformers"
    )
    rules.add_argument("--negatives", type=count, default=4, help="most negatives of a pair, the best that pass (default: 4)")
    rules.add_argument(
        "--range-min", type=count, default=0, help="documents to skip at the top, without right answers (default: 0)"
    )
    rules.add_argument(
        "--range-max", type=count, help="the last rank to consider, without right answers (default: range-min + 10 * negatives)"
    )
    rules.add_argument(
        "--margin",
        type=float,
        default=0.0,
        help="least difference of a negative's score from the positive's, as a mean cosine over query vectors (default: 0)",
    )
    rules.add_argument(
        "--relative-margin", type=float, default=0.05, help="the same as a share of the positive's score (default: 0.05)"
    )
    rules.add_argument(
        "--budget", help="of the search, such as 16:64, or stages, 1:1:1000>16:64, which are faster (default: all vectors)"
    )
    add_image_flag(parser)
    add_device_flags(parser)
    add_mesh_flags(parser)
    add_host_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Mine a source."""
    start(arguments)
    selection = Selection(
        negatives=arguments.negatives,
        range_min=arguments.range_min,
        range_max=arguments.range_max,
        margin=arguments.margin,
        relative_margin=arguments.relative_margin,
    )
    names = arguments.source, arguments.out, arguments.data
    with fail_together(), stop_signal() as stop, stop.at_once():
        mine_source(arguments.model, *names, selection, arguments.budget, mesh_sizes(arguments))
