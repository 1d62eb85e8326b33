"""Choose the number of survivors of a first stage on a sample of queries, for `metaembed search --budget=auto`.

With the probability --confidence, at least the share --coverage of all such queries keeps its k best documents in the first stage.
Each budget of --first is calibrated, and searches use the cheapest.
"""

import argparse

from metaembed_jax.flags import local_path, model_name
from metaembed_jax.hosts.failures import fail_together
from metaembed_jax.hosts.votes import stop_signal
from metaembed_jax.inputs.image_flags import add_image_flag
from metaembed_jax.retrieval import index_and_search
from metaembed_jax.startup import add_device_flags, add_host_flags, add_mesh_flags, mesh_sizes, start

EXAMPLES = """
  metaembed calibrate --index=INDEX --queries=queries.jsonl            299 queries or more, {"text": "a red car"} each
  metaembed calibrate --index=INDEX --queries=queries.jsonl --first=1:1,2:4 --last=8:16 -k 5
  metaembed search --index=INDEX "a red car" --budget=auto
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--index", type=local_path, required=True, help="an index that `metaembed index` wrote")
    parser.add_argument(
        "--queries", type=local_path, required=True, help="a .jsonl or .parquet of text and image, or a folder of images"
    )
    parser.add_argument(
        "--first",
        help="budgets of the first stage to calibrate, such as 1:1,2:4x32 (default: the usual ones below the last)",
    )
    parser.add_argument("--last", help="budget of the second stage (default: all vectors)")
    parser.add_argument("-k", type=int, default=10, help="the number of documents of a search (default: 10)")
    parser.add_argument("--coverage", type=float, default=0.99, help="the share of queries that lose nothing (default: 0.99)")
    parser.add_argument("--confidence", type=float, default=0.95, help="the probability that the share is reached (default: 0.95)")
    parser.add_argument("--model", type=model_name, help="the path or id of the index's model, if it has moved")
    add_image_flag(parser)
    add_device_flags(parser)
    add_mesh_flags(parser)
    add_host_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Calibrate an index."""
    start(arguments)
    with fail_together(), stop_signal() as stop, stop.at_once():
        index_and_search.calibrate(
            arguments.index,
            arguments.queries,
            (arguments.first, arguments.last),
            arguments.k,
            (arguments.coverage, arguments.confidence),
            arguments.model,
            mesh_sizes(arguments),
        )
