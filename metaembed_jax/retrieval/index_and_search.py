"""The commands `index` and `search`."""

from collections.abc import Mapping
from pathlib import Path

from metaembed_jax.data.documents import open_documents
from metaembed_jax.data.sources.image_files import read_image_file
from metaembed_jax.devices import check_devices, describe_devices
from metaembed_jax.errors import UserError, printable
from metaembed_jax.files import is_bucket
from metaembed_jax.inputs.images import open_image
from metaembed_jax.late_interaction.budgets import parse_searches
from metaembed_jax.late_interaction.stages import largest_budget
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.build import index_documents
from metaembed_jax.retrieval.hits import Hits
from metaembed_jax.retrieval.index import Index
from metaembed_jax.retrieval.searchable import Searchable

TEXT_LENGTH = 100  # characters of a text that are printed


def index(
    model: str,
    path: Path,
    out: Path,
    budget: int | None,
    dtype: str,
    exact: str | None,
    skip: int,
    mesh: Mapping[str, int] | None = None,
) -> None:
    """Let an index follow documents, up to `skip` of which are left out if they cannot be read.

    Args:
      mesh: sizes of its axes; without any, the default of `MetaEmbed.from_pretrained`.

    Raises:
      UserError: as `open_documents`, `MetaEmbed.from_pretrained` and `index_documents`.
    """
    documents = open_documents(path, skip=skip)
    model_path = None if is_bucket(model) else Path(model).expanduser()
    name = str(model_path.absolute()) if model_path and model_path.exists() else model
    encoder = _load(model, mesh)
    print(describe_devices(encoder.mesh, encoder.weight_bytes), flush=True)
    types = {"dtype": dtype, "exact": exact}
    index_documents(encoder, documents, out, name=name, budget=budget, **types, skip=skip, progress=True)
    if pages := documents.unread_pages:
        print(f"{path}: {pages:,} pages of TIFFs were not read; of a TIFF in a table, the first page is; index their folder")


def search(
    folder: Path,
    query: str | None,
    image: Path | None,
    budget: str | None,
    k: int | None,
    model: str | None,
    where: Mapping | None,
    mesh: Mapping[str, int] | None = None,
) -> None:
    """Print the best documents of a query.

    Args:
      where: a filter of documents, as for `Index.search`.
      mesh: as for `index`, of the encoder; the search uses all devices as one axis.

    Raises:
      UserError: the query is empty, the folder is not an index or holds vectors of another model, the budget is larger than the
        index, or the filter is wrong.
    """
    if query is None and image is None:
        raise UserError('nothing to search for: expected a text, such as "a red car", or --image=FILE, or both')
    item = ({"text": query} if query is not None else {}) | (
        {"image": open_image(read_image_file(image), str(image))} if image is not None else {}
    )
    loaded = Index.load(folder)
    name = model or loaded.model
    if not name:
        raise UserError(f"{folder} does not record its model; name the model with --model")
    _print_hits(find(loaded, _load(name, mesh), item, budget, k, where))


def find(index: Searchable, encoder: MetaEmbed, item: dict, budget: str | None, k: int | None, where: Mapping | None) -> Hits:
    """Encode a query and search for it.

    Args:
      item: the query, as for `MetaEmbed.encode_query`.
      budget: such as 4:8, or stages, 1:1:1000>16:64.

    Raises:
      UserError: the index has vectors of another model, the budget is larger than the index, or the filter is wrong.
    """
    index.check_model(encoder)
    largest = encoder.config.vectors("query"), index.vectors
    stages, *others = [(largest,)] if budget is None else parse_searches(budget, largest, "--budget")
    if others:
        raise UserError(f"--budget={budget}: expected one search")
    return index.search(encoder.encode_query([item], budget=largest_budget([stages])[0]), k, stages, where=where)


def _print_hits(hits: Hits) -> None:
    """Print the hits of a single query, one on a line."""
    if not hits.ids.size:
        print("no document matches the filter")
    rows = zip(hits.scores[0].tolist(), hits.ids[0], hits.metadata(0), strict=True)
    for rank, (score, item, fields) in enumerate(rows, 1):
        metadata = {key: str(value) for key, value in fields.items() if value is not None}  # of any type, by `Index.add`
        page = f"page {metadata['page']}" if "page" in metadata else ""
        source = ", ".join(filter(None, (metadata.get("path", ""), page)))
        columns = filter(None, (item, source, metadata.get("text", "")[:TEXT_LENGTH]))
        print(f"{rank:3}  {score:8.4f}  " + "  ".join(map(printable, columns)))


def _load(name: str, sizes: Mapping[str, int] | None) -> MetaEmbed:
    """Load a model on a mesh of some sizes."""
    check_devices()
    mesh = None
    if sizes:
        try:
            mesh = make_mesh(sizes.get("data", -1), sizes.get("fsdp", 1), sizes.get("tensor", 1), sizes.get("slices", 0))
        except UserError as error:
            raise UserError(str(error).replace("config.mesh", "--mesh")) from error
    return MetaEmbed.from_pretrained(name, mesh=mesh)
