"""Boards: page retrieval in miniature. A document is a page of icons of random sizes and positions; a query names one or two.

Pages of the validation and test splits are fixed and stored. They show only icons of their split, each icon on three pages. The
stored query of a page names all its icons in order, separated by ", "; `retrieval` makes queries of one and two names from it.
Training pages are not stored: page n of epoch e is composed when it is read, from icons of the training split, and is a pure
function of (seed, e, n) and the curriculum at the step. Negatives are mined in a fixed set of them, `FixedPages`.

The icons source is prepared first.
"""

import functools
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from metaembed_jax.config.run import DataConfig
from metaembed_jax.data.sources import icons, records
from metaembed_jax.errors import UserError

NAME = "boards"
VERSION = "1.1.0"
SIDE = 224  # pixels of a fixed page
LARGEST = 84  # pixels of an icon's canvas on a page
FEWEST, MOST = 4, 9  # icons of a fixed page
ROUNDS = 3  # times that each icon is dealt to a fixed page
PAGE_SEED = 0  # of the fixed pages; another seed needs another version
FIXED_EPOCHS = 8  # of training pages in which negatives can be mined: 12,000 pages
SEPARATOR = ", "


def cells(count: int, random: np.random.Generator, page_side: int = SIDE) -> list[tuple[int, int, int, int]]:
    """Cut a page at random into strips across or down, and these into cells; return `count` cells (x, y, width, height)."""

    def cut(count):
        """Cut the side of the page into `count` intervals (start, length)."""
        edges = np.cumsum([0, *random.uniform(0.85, 1.15, count)])
        edges = np.rint(edges / edges[-1] * page_side).astype(int)
        return zip(edges[:-1].tolist(), np.diff(edges).tolist(), strict=True)

    strips = round(count**0.5)
    in_strip = random.permutation([count // strips + (number < count % strips) for number in range(strips)]).tolist()
    across = [(x, y, width, height) for (y, height), n in zip(cut(strips), in_strip, strict=True) for x, width in cut(n)]
    return across if random.integers(2) else [(y, x, height, width) for x, y, width, height in across]


def compose(drawings: Sequence[Image.Image], random: np.random.Generator, page_side: int = SIDE) -> Image.Image:
    """Return a page (mode L) of drawings (mode L), each in its own cell at a random size and position."""
    page = Image.new("L", (page_side, page_side), 255)
    for drawing, (x, y, width, height) in zip(drawings, cells(len(drawings), random, page_side), strict=True):
        room = min(width, height, LARGEST)
        side = int(random.integers(round(0.75 * room), room, endpoint=True))
        right, down = random.integers(0, (width - side, height - side), endpoint=True)
        page.paste(drawing.resize((side, side), Image.Resampling.BILINEAR), (x + int(right), y + int(down)))
    return page


def name_some(names: Sequence[str], random: np.random.Generator) -> str:
    """Return a query of one or two of the names, with equal chances, in random order."""
    count = min(len(names), int(random.integers(1, 2, endpoint=True)))
    return SEPARATOR.join(names[int(number)] for number in random.permutation(len(names))[:count])


class Drawings(Sequence[tuple[str, Image.Image]]):
    """(name, image of mode L) of each drawing in a split of the icons source. A drawing is decoded once, when it is first read.

    Attributes:
      names: names of all drawings.
    """

    def __init__(self, data_dir: str | Path, split: str):
        self.records = records.open_split(Path(data_dir) / icons.NAME, icons.VERSION, split).with_descriptions()
        self.decoded: list[Image.Image | None] = [None] * len(self.records)
        self.names = [self.records.describe(row)["query"]["text"] for row in range(len(self.records))]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> tuple[str, Image.Image]:
        drawing = self.decoded[row]
        if drawing is None:
            drawing = self.decoded[row] = Image.open(io.BytesIO(self.records[row]["positive"]["image"])).convert("L")
        return self.names[row], drawing


class Pages(Sequence[dict]):
    """Training pages, composed when they are read.

    Every epoch deals all icons, `MOST` to a page; the curriculum sets how many of them the page shows at a step. Two pages of an
    epoch never share an icon, so a page that does not answer a query rarely shows an icon that the query names.

    Args:
      page_side: pixels; a smaller page than the fixed ones is cheaper while it shows few icons.
      curriculum: ((until step, fewest icons, most icons), ...), by rising step; the step of the last entry is not read, since it
        applies until the end. Empty: 4 to 9.

    Raises:
      UserError: the curriculum is malformed, or the drawings are too few for a page.
    """

    def __init__(
        self,
        drawings: Drawings,
        seed: int,
        curriculum: Sequence[tuple[int, int, int]] = (),
        page_side: int = SIDE,
    ):
        self.drawings, self.seed, self.page_side = drawings, seed, page_side
        self.curriculum = tuple(curriculum) or ((0, FEWEST, MOST),)
        for _, fewest, most in self.curriculum:
            if not 1 <= fewest <= most <= MOST:
                raise UserError(f"config.data.curriculum={self.curriculum}: expected 1 <= fewest <= most <= {MOST} icons of a page")
        steps = [until for until, _, _ in self.curriculum[:-1]]
        if steps != sorted(steps):
            raise UserError(f"config.data.curriculum={self.curriculum}: expected rising steps (the last one does not count)")
        if len(drawings) < MOST:
            raise UserError(f"boards: {len(drawings)} training icons; expected at least {MOST}, for a page")
        self._dealt = -1, np.empty(0, np.int64)  # an epoch, and the order of icons in it

    def __len__(self) -> int:
        """Return the number of pages of an epoch."""
        return len(self.drawings) // MOST

    def __getitem__(self, row: int) -> dict:
        return self.compose(row, 0, 0)

    def icons_at(self, step: int) -> tuple[int, int]:
        """Return the fewest and the most icons of a page at a step."""
        _, fewest, most = next((entry for entry in self.curriculum[:-1] if step < entry[0]), self.curriculum[-1])
        return fewest, most

    def compose(self, row: int, epoch: int, step: int) -> dict:
        """Return a page and its query."""
        text, page_icons, random = self._draw(row, epoch, step)
        page = compose([self.drawings[icon][1] for icon in page_icons], random, self.page_side)
        return self._record(text, page)

    def describe(self, row: int, epoch: int, step: int) -> dict:
        """Return the description of the record that `compose` returns, without drawing its page."""
        text, _, _ = self._draw(row, epoch, step)
        return self._record(text, (self.page_side, self.page_side))

    def names(self, row: int, epoch: int, step: int) -> list[str]:
        """Return the names of the icons of a page."""
        _, page_icons, _ = self._draw(row, epoch, step)
        return [self.drawings.names[icon] for icon in page_icons]

    def _draw(self, row: int, epoch: int, step: int) -> tuple[str, list[int], np.random.Generator]:
        """Return the query of a page, the indices of its icons, and the generator that lays out the page."""
        random = np.random.default_rng([self.seed, epoch, row])
        fewest, most = self.icons_at(step)
        count = int(random.integers(fewest, most, endpoint=True))
        page_icons = self._deal(epoch)[row * MOST : row * MOST + count].tolist()
        return name_some([self.drawings.names[icon] for icon in page_icons], random), page_icons, random

    def _record(self, text: str, image: Image.Image | tuple[int, int]) -> dict:
        return {"query": {"text": text}, "positive": {"image": image}, "negatives": [], "source": NAME}

    def _deal(self, epoch: int) -> np.ndarray:
        dealt = self._dealt  # read once: several threads compose, and some may be an epoch ahead
        if dealt[0] != epoch:
            dealt = self._dealt = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.drawings))
        return dealt[1]


class FixedPages(Sequence[dict]):
    """The training pages of the first `FIXED_EPOCHS`, each with one query, as a source that is the same in every epoch.

    An icon is on a page of each epoch, and drawings may share a name, so a query has right answers next to its own page.
    """

    def __init__(self, pages: Pages):
        self.pages = pages

    def __len__(self) -> int:
        return FIXED_EPOCHS * len(self.pages)

    def __getitem__(self, row: int) -> dict:
        epoch, page = self._page(row)
        record, png = self.pages.compose(page, epoch, 0), io.BytesIO()
        record["positive"]["image"].save(png, "png")
        return record | {"positive": {"image": png.getvalue()}}

    def describe(self, row: int, epoch: int = 0, step: int = 0) -> dict:
        """Return the description of a record, without drawing its page."""
        epoch, page = self._page(row)
        return self.pages.describe(page, epoch, step)

    def answering(self, query: dict) -> set[int]:
        """Return the rows whose pages show all names of a query."""
        return set.intersection(*(self._rows_of_names[name] for name in query["text"].split(SEPARATOR)))

    @functools.cached_property
    def _rows_of_names(self) -> dict[str, set[int]]:
        rows = {}
        for row in range(len(self)):
            epoch, page = self._page(row)
            for name in self.pages.names(page, epoch, 0):
                rows.setdefault(name, set()).add(row)
        return rows

    def _page(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")  # a loop over a sequence ends by it
        return divmod(row, len(self.pages))


def deal_fixed(names: Sequence[str], random: np.random.Generator) -> list[list[int]]:
    """Return the icons of each fixed page: `FEWEST` to `MOST` on a page, each icon on `ROUNDS` pages, no name twice on a page.

    Raises:
      UserError: there are too few icons, or too few different names.
    """
    pages = []
    for _ in range(ROUNDS):
        dealt = next(filter(None, (_deal_round(names, random) for _ in range(100))), None)
        if dealt is None:
            raise UserError(f"boards: {len(names)} icons of {len(set(names))} names are too few for pages of {FEWEST} to {MOST}")
        pages += dealt
    return pages


def _deal_round(names: Sequence[str], random: np.random.Generator) -> list[list[int]] | None:
    """Deal each icon to one page; return None if the last icons share a name, and so fit no page."""
    pages, remaining = [], random.permutation(len(names)).tolist()
    while remaining:
        # A page may take all remaining icons, or leave enough for another page.
        sizes = [size for size in range(FEWEST, MOST + 1) if len(remaining) == size or len(remaining) - size >= FEWEST]
        size, page = int(random.choice(sizes)) if sizes else 0, []
        for icon in remaining:
            if len(page) < size and all(names[icon] != names[other] for other in page):
                page.append(icon)
        if not page or len(page) < size:
            return None
        pages.append(page)
        remaining = [icon for icon in remaining if icon not in page]
    return pages


def fixed_pages(drawings: Sequence[tuple[str, Image.Image]], split: str) -> Iterator[dict]:
    """Yield the records of a split's fixed pages."""
    random = np.random.default_rng([PAGE_SEED, records.SPLITS.index(split)])
    names = [name for name, _ in drawings]
    for page in tqdm(deal_fixed(names, random), desc=f"boards: composing {split} pages", unit="page", mininterval=0.5):
        png = io.BytesIO()
        compose([drawings[icon][1] for icon in page], random).save(png, "png")
        text = SEPARATOR.join(names[icon] for icon in page)
        yield {"query": {"text": text}, "positive": {"image": png.getvalue()}, "source": NAME}


class Boards(tfds.core.GeneratorBasedBuilder):
    """Writer of the fixed pages as ArrayRecord."""

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(self, *, pages: Mapping[str, Sequence[dict]], **kwargs):
        self.pages = pages
        super().__init__(**kwargs)

    def _info(self):
        return self.dataset_info_from_configs(features=records.features(), description=__doc__)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.pages}

    def _generate_examples(self, split):
        for number, record in enumerate(self.pages[split]):
            yield number, records.to_example(record)


def prepare(data_dir: str | Path) -> dict:
    """Prepare the icons, and write the fixed pages to `data_dir`/boards, unless they are prepared already.

    Returns:
      The marker: {"version", "fingerprint", "pages"}. It is written last: if a preparation was killed, the next call starts
      again.
    """
    icons_marker = icons.prepare(data_dir)
    directory = Path(data_dir) / NAME
    if (marker := records.read_marker(directory, VERSION)) and marker["icons"] == icons_marker["fingerprint"]:
        return marker
    pages = {split: list(fixed_pages(Drawings(data_dir, split), split)) for split in ("validation", "test")}
    records.write(Boards(pages=pages, data_dir=str(data_dir), file_format="array_record"))
    contents = ((page["query"]["text"], page["positive"]["image"]) for split_pages in pages.values() for page in split_pages)
    marker = {
        "version": VERSION,
        "fingerprint": records.fingerprint(contents),
        "icons": icons_marker["fingerprint"],
        "pages": {split: len(split_pages) for split, split_pages in pages.items()},
    }
    shutil.copyfile(Path(data_dir) / icons.NAME / "tokenizer.json", directory / "tokenizer.json")  # boards use the words of icons
    records.write_marker(directory, marker)
    print(f"boards: pages {marker['pages']}, fingerprint {marker['fingerprint']}")
    return marker


def training(data: DataConfig, seed: int) -> Pages:
    """Return training pages by `config.data.curriculum` and `config.data.page_side`."""
    return Pages(Drawings(data.dir, "train"), seed, data.curriculum, data.page_side)


def fixed_training(data_dir: str | Path) -> FixedPages:
    """Return the pages of the first epochs of seed 0, of 4 to 9 icons."""
    return FixedPages(Pages(Drawings(data_dir, "train"), seed=0))


def retrieval(pairs: Sequence[dict]) -> records.Retrieval:
    """Return a split as a search task: a query for each name of the split, and a query for two names of each page.

    Pages that show all names of a query are relevant.
    """
    pages = [(record["query"]["text"].split(SEPARATOR), record["positive"]["image"]) for record in pairs]
    holders: dict[str, set[int]] = {}
    for number, (names, _) in enumerate(pages):
        for name in names:
            holders.setdefault(name, set()).add(number)
    random = np.random.default_rng(PAGE_SEED)
    name_pairs = {tuple(names[number] for number in random.permutation(len(names))[:2]) for names, _ in pages}
    queries = [(name,) for name in sorted(holders)] + sorted(name_pairs)
    relevance = [set.intersection(*(holders[name] for name in query)) for query in queries]
    return records.Retrieval(
        [{"text": SEPARATOR.join(query)} for query in queries], [{"image": image} for _, image in pages], relevance
    )
