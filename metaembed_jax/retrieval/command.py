"""What the commands `index` and `search` do."""

from pathlib import Path

from metaembed_jax.data.documents import open_documents
from metaembed_jax.data.sources.files import read_image_file
from metaembed_jax.devices import check_devices, describe_devices
from metaembed_jax.errors import UserError
from metaembed_jax.files import is_bucket
from metaembed_jax.flags import printable
from metaembed_jax.inputs.images import open_image
from metaembed_jax.late_interaction.budgets import parse_searches
from metaembed_jax.late_interaction.stages import largest_budget
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.build import index_documents
from metaembed_jax.retrieval.index import Index

SHOWN = 10
LONGEST = 100  # letters of a text that are shown


def index(model: str, documents: Path, out: Path, budget: int | None, dtype: str) -> None:
    """Encodes documents into an index, with a bar.

    Raises:
      UserError: of `open_documents`, `MetaEmbed.from_pretrained` and `index_documents`.
    """
    found, path = open_documents(documents), None if is_bucket(model) else Path(model).expanduser()
    name = str(path.absolute()) if path and path.exists() else model
    check_devices()
    encoder = MetaEmbed.from_pretrained(model)
    print(describe_devices(encoder.mesh), flush=True)
    made = index_documents(encoder, found, out, name=name, budget=budget, dtype=dtype, progress=True)
    print(f"{out}: {len(made):,} items, {made.vectors} vectors each. What a search reads is checked; Index.verify() checks all.")


def search(folder: Path, query: str | None, image: Path | None, budget: str | None, k: int | None, model: str | None) -> None:
    """Prints what fits a query best.

    Raises:
      UserError: no query, no index, an index of another model, or a budget beyond it.
    """
    if query is None and image is None:
        raise UserError('nothing to search for: give a text, "a red car", or --image=FILE, or both')
    item = ({"text": query} if query is not None else {}) | (
        {"image": open_image(read_image_file(image), str(image))} if image is not None else {}
    )
    made = Index.load(folder)
    name = model or made.model
    if not name:
        raise UserError(f"{folder} does not record its model; say which with --model")
    check_devices()
    encoder = MetaEmbed.from_pretrained(name)
    made.check_model(encoder)
    largest = encoder.config.vectors("query"), made.vectors
    searches = [(largest,)] if budget is None else parse_searches(budget, largest)
    if len(searches) > 1:
        raise UserError(f"--budget={budget}: one search at a time")
    stages = searches[0]
    query_QRD = encoder.encode_query([item], budget=largest_budget([stages])[0])
    most = min([SHOWN, len(made), *(stage[2] for stage in stages[:-1])])
    scores, ids = made.search(query_QRD, most if k is None else k, stages)
    for place, (score, found) in enumerate(zip(scores[0].tolist(), ids[0], strict=True), 1):
        about = {key: str(value) for key, value in made.metadata(found).items() if value is not None}  # of `Index.add`, anything
        where = ", ".join(filter(None, (about.get("path"), "page" in about and f"page {about['page']}")))
        shown = filter(None, (found, where, about.get("text", "")[:LONGEST]))
        print(f"{place:3}  {score:8.4f}  " + "  ".join(map(printable, shown)))
