"""Give a collection of Qdrant the items of an index: what is new or changed is written, and what is gone is deleted.

After a kill, the same command continues.
"""

import argparse

from metaembed_jax.errors import UserError
from metaembed_jax.flags import local_path
from metaembed_jax.retrieval.index import Index
from metaembed_jax.retrieval.qdrant import QdrantIndex

EXAMPLES = """
  metaembed upload --index=INDEX --to=http://localhost:6333 --collection=pages
  metaembed upload --index=INDEX --to=edge:FOLDER --collection=pages --vectors=16
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--index", type=local_path, required=True, help="an index that `metaembed index` wrote")
    parser.add_argument("--to", required=True, metavar="LOCATION", help="edge:FOLDER, a folder, or the URL of a server")
    parser.add_argument("--collection", required=True, metavar="NAME", help="name of the collection; created if it does not exist")
    parser.add_argument("--vectors", type=int, help="vectors to store of each item, from the first (default: all)")


def run(arguments: argparse.Namespace) -> None:
    """Let a collection follow an index."""
    index = Index.load(arguments.index)
    vectors = index.vectors if arguments.vectors is None else arguments.vectors
    if not 1 <= vectors <= index.vectors:  # before the collection is created
        raise UserError(f"--vectors={vectors}: expected 1 to {index.vectors}, the vectors that {index.folder} stores of an item")
    collection = QdrantIndex.create(arguments.to, arguments.collection, index.width, vectors, index.fingerprint)
    followed = collection.follow(index, progress=True)
    collection.close()
    numbers = ", ".join(f"{count:,} {name}" for name, count in followed._asdict().items())
    print(f"{collection.server}, {collection.name}: {numbers}")
