"""Search an index with a text, an image, or both."""

import argparse
import json

from metaembed_jax.errors import shortened
from metaembed_jax.flags import argument_errors, local_path, model_name
from metaembed_jax.hosts.failures import fail_together
from metaembed_jax.hosts.votes import stop_signal
from metaembed_jax.inputs.image_flags import add_image_flag
from metaembed_jax.retrieval import index_and_search
from metaembed_jax.retrieval.filters import EXAMPLE, parse_filter
from metaembed_jax.startup import add_device_flags, add_host_flags, add_mesh_flags, mesh_sizes, start

EXAMPLES = """
  metaembed search --index=INDEX "a red car" -k 5
  metaembed search --index=INDEX --image=car.png --budget="1:1:1000>16:64"
  metaembed search --index=INDEX "a red car" --where='{"page": {"$lte": 3}, "path": {"$in": ["a.pdf", "b.pdf"]}}'
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--index", type=local_path, required=True, help="an index that `metaembed index` wrote")
    parser.add_argument("query", nargs="?", help="a text")
    parser.add_argument("--image", type=local_path, help="an image file")
    parser.add_argument(
        "--budget",
        help="such as 4:8, or 4:8x32 with 32 numbers of a vector; or stages, 1:1:1000>16:64; or auto, those of `metaembed "
        "calibrate` (default: all vectors)",
    )
    parser.add_argument(
        "--where",
        type=as_filter,
        metavar="JSON",
        help='search only documents whose metadata match: {"lang": "en"}, {"page": {"$gte": 2, "$lt": 9}}; with $eq, $ne, $gt, '
        '$gte, $lt, $lte, and lists of values $in, $nin; {"$or": [{...}, {...}]}, $and and {"$not": {...}} combine filters',
    )
    parser.add_argument(
        "--certified",
        action="store_true",
        help="score the best of an int8 index by its exact vectors, and prove that they are the best",
    )
    parser.add_argument("-k", type=int, help="the number of documents to show (default: 10)")
    parser.add_argument("--model", type=model_name, help="the path or id of the index's model, if it has moved")
    add_image_flag(parser)
    add_device_flags(parser)
    add_mesh_flags(parser)
    add_host_flags(parser)


def as_filter(text: str) -> dict:
    """Parse a flag's filter in JSON."""
    try:
        where = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{shortened(text)}: expected JSON, {EXAMPLE}, in single quotes for the shell ({error})"
        raise argparse.ArgumentTypeError(reason) from error
    with argument_errors():
        parse_filter(where)
    return where


def run(arguments: argparse.Namespace) -> None:
    """Print the documents that fit a query best."""
    start(arguments)
    with fail_together(), stop_signal() as stop, stop.at_once():
        index_and_search.search(
            arguments.index,
            arguments.query,
            arguments.image,
            arguments.budget,
            arguments.k,
            arguments.model,
            arguments.where,
            arguments.certified,
            mesh_sizes(arguments),
        )
