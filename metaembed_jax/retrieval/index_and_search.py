"""The commands `index`, `search` and `calibrate`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from metaembed_jax.data.documents import open_documents
from metaembed_jax.data.sources.image_files import read_image_file
from metaembed_jax.devices import check_devices, describe_devices
from metaembed_jax.errors import UserError, printable
from metaembed_jax.files import is_bucket
from metaembed_jax.inputs.images import open_image
from metaembed_jax.late_interaction.budgets import parse_searches, search_name
from metaembed_jax.late_interaction.groups import GROUPS, Budget
from metaembed_jax.late_interaction.stages import Stages, as_stages, largest_budget
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.build import index_documents
from metaembed_jax.retrieval.calibration import choose_rank, describe
from metaembed_jax.retrieval.hits import Hits
from metaembed_jax.retrieval.index import Index
from metaembed_jax.retrieval.searchable import Searchable

TEXT_LENGTH = 100  # characters of a text that are printed
LARGEST_NAMED = 999_999  # query vectors that a budget can name


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
    encoder = load_model(model, mesh)
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
    certified: bool,
    mesh: Mapping[str, int] | None = None,
) -> None:
    """Print the best documents of a query.

    Args:
      budget: of `parse_searches`, or "auto".
      where: a filter of documents, as for `Index.search`.
      certified: as for `Index.search`.
      mesh: as for `index`, of the encoder; the search uses all devices as one axis.

    Raises:
      UserError: the query is empty, the folder is not an index or holds vectors of another model, the budget is larger than the
        index, or k or the filter is wrong.
    """
    if query is None and image is None:
        raise UserError('nothing to search for: expected a text, such as "a red car", or --image=FILE, or both')
    item = ({"text": query} if query is not None else {}) | (
        {"image": open_image(read_image_file(image), str(image))} if image is not None else {}
    )
    loaded = Index.load(folder)
    check_devices()
    # A wrong filter, k or budget is an error before the model is loaded.
    if budget not in (None, "auto"):
        parse_search(budget, Budget(LARGEST_NAMED, loaded.vectors, loaded.width))
    loaded.search(np.zeros((0, 1, loaded.width), np.float32), k, where=where, certified=certified)
    encoder = _load_encoder(loaded, model, mesh)
    budget = search_name(loaded.calibrated_stages(k)) if budget == "auto" else budget
    _print_hits(find(loaded, encoder, item, budget, k, where, certified))


def calibrate(
    folder: Path,
    queries: Path,
    budgets: tuple[str | None, str | None],
    k: int,
    shares: tuple[float, float],
    model: str | None,
    mesh: Mapping[str, int] | None = None,
) -> None:
    """Calibrate an index on the queries of a table, and print the results.

    Args:
      budgets: the first budgets to calibrate, by default those of `GROUPS` below the last; and the last, by default all vectors.
      shares: coverage and confidence.
      mesh: as for `search`.

    Raises:
      UserError: as `open_documents`, `search` and `Index.calibrate`.
    """
    loaded, documents = Index.load(folder), open_documents(queries)
    choose_rank(len(documents), *shares)  # before the model is loaded
    encoder = _load_encoder(loaded, model, mesh)
    loaded.check_model(encoder)
    if encoder.config.reads_states:
        raise UserError(f"{folder}: the vectors of its model are not nested, so there is no first stage to calibrate")
    largest = Budget(encoder.config.vectors("query"), loaded.vectors, loaded.width)
    last, *others = [largest._replace(width=0)] if budgets[1] is None else _parse_budgets(budgets[1], largest, "--last")
    if others:
        raise UserError(f"--last={budgets[1]}: expected one budget")
    usual = (Budget(*sizes, last.width) for sizes in GROUPS)
    below = [budget for budget in usual if budget.query <= last.query and budget.document <= last.document and budget != last]
    firsts = (below or [Budget(1, 1, last.width)]) if budgets[0] is None else _parse_budgets(budgets[0], largest, "--first")
    (coverage, confidence), query_vectors = shares, max(budget.query for budget in (last, *firsts))
    query_QRD = encoder.encode_query(documents, budget=query_vectors, progress=True)
    for first in firsts:
        print(describe(loaded.calibrate(query_QRD, first, last, k=k, coverage=coverage, confidence=confidence)), flush=True)
    print(f"--budget=auto is {search_name(loaded.calibrated_stages(k))} for up to {k} documents")


def _load_encoder(index: Index, model: str | None, mesh: Mapping[str, int] | None) -> MetaEmbed:
    """Load the model that encoded the items of an index."""
    name = model or index.model
    if not name:
        raise UserError(f"{index.folder} does not record its model; name the model with --model")
    return load_model(name, mesh)


def find(
    index: Searchable,
    encoder: MetaEmbed,
    item: dict,
    budget: str | None,
    k: int | None,
    where: Mapping | None,
    certified: bool = False,
) -> Hits:
    """Encode a query and search for it.

    Args:
      item: the query, as for `MetaEmbed.encode_query`.
      budget: such as 4:8, or stages, 1:1:1000>16:64.
      certified: as for `Index.search`; expects an `Index`.

    Raises:
      UserError: the index has vectors of another model, the budget is larger than the index, or the filter is wrong.
    """
    index.check_model(encoder)
    largest = Budget(encoder.config.vectors("query"), index.vectors, encoder.dimension)
    stages = as_stages(largest[:2], largest) if budget is None else parse_search(budget, largest)
    if encoder.config.reads_states and budget is not None:
        raise UserError(
            f"--budget={budget}: the vectors of this model are not nested; search without it, and index with --budget=N to store N "
            "vectors of a document"
        )
    query_QRD = encoder.encode_query([item], budget=largest_budget([stages])[0])
    return index.search(query_QRD, k, stages, where=where, **({"certified": True} if certified else {}))


def parse_search(text: str, largest: Budget) -> Stages:
    """Return the search of the flag --budget.

    Raises:
      UserError: as `parse_searches`, or there are several searches.
    """
    search, *others = parse_searches(text, largest, "--budget")
    if others:
        raise UserError(f"--budget={text}: expected one search")
    return search


def _parse_budgets(text: str, largest: Budget, flag: str) -> list[Budget]:
    """Return the budgets of a flag, which are not in stages."""
    searches = parse_searches(text, largest, flag)
    if any(len(search) > 1 for search in searches):
        raise UserError(f"{flag}={text}: expected budgets r_q:r_c, such as 1:1, without survivors")
    return [search[0].budget for search in searches]


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
    if hits.certified is not None and hits.rescored is not None:
        state = f"not certified: {hits.uncertified_reason}" if hits.uncertified_reason else "certified"
        print(f"{state}; {hits.rescored[0]:,} items were scored by their exact vectors")


def load_model(name: str, sizes: Mapping[str, int] | None) -> MetaEmbed:
    """Load a model on a mesh of some sizes; without any, the default of `MetaEmbed.from_pretrained`.

    Raises:
      UserError: as `MetaEmbed.from_pretrained` and `make_mesh`.
    """
    check_devices()
    mesh = None
    if sizes:
        try:
            mesh = make_mesh(sizes.get("data", -1), sizes.get("fsdp", 1), sizes.get("tensor", 1), sizes.get("slices", 0))
        except UserError as error:
            raise UserError(str(error).replace("config.mesh", "--mesh")) from error
    return MetaEmbed.from_pretrained(name, mesh=mesh)
