"""Boards: page retrieval in miniature. A document is a page of icons at random places and sizes; the query names one or two.

Pages of the validation and test splits are fixed and lie on disk; they hold icons of that split only, each of them on three
pages. On disk a page's query text names all its icons in order, separated by ", "; `retrieval` makes the queries of one and of
two names from it. Training pages are never stored: page n of epoch e is composed when it is asked for, a pure function of
(seed, e, n) and the step's place in the curriculum, from icons of the training split only.

The source stands on the icons source and prepares it first.
"""

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
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
ROUNDS = 3  # how many fixed pages an icon is on
PAGE_SEED = 0  # of the fixed pages, part of what the version names
SEPARATOR = ", "


def cells(count: int, random: np.random.Generator, page_side: int = SIDE) -> list[tuple[int, int, int, int]]:
    """Cuts a page at random into `count` disjoint cells (left, top, width, height): strips across or down, each into pieces."""

    def cut(parts):
        """(start, length) of pieces of the page's side."""
        edges = np.cumsum([0, *random.uniform(0.85, 1.15, parts)])
        edges = np.rint(edges / edges[-1] * page_side).astype(int)
        return zip(edges[:-1].tolist(), np.diff(edges).tolist(), strict=True)

    strips = round(count**0.5)
    pieces = random.permutation([count // strips + (number < count % strips) for number in range(strips)]).tolist()
    found = [(x, y, width, height) for (y, height), parts in zip(cut(strips), pieces, strict=True) for x, width in cut(parts)]
    return found if random.integers(2) else [(y, x, height, width) for x, y, width, height in found]


def compose(drawings: Sequence[Image.Image], random: np.random.Generator, page_side: int = SIDE) -> Image.Image:
    """A page, mode L, of the drawings (mode L), each in a cell of its own at a random place and size."""
    page = Image.new("L", (page_side, page_side), 255)
    for drawing, (left, top, width, height) in zip(drawings, cells(len(drawings), random, page_side), strict=True):
        room = min(width, height, LARGEST)
        side = int(random.integers(round(0.75 * room), room, endpoint=True))
        x, y = random.integers(0, (width - side, height - side), endpoint=True)
        page.paste(drawing.resize((side, side), Image.Resampling.BILINEAR), (left + int(x), top + int(y)))
    return page


def name_some(names: Sequence[str], random: np.random.Generator) -> str:
    """One or (where there are two) with the same chance two of the names, in random order, as a query says them."""
    count = min(len(names), int(random.integers(1, 2, endpoint=True)))
    return SEPARATOR.join(names[number] for number in random.permutation(len(names))[:count])


class Drawings(Sequence):
    """The drawings of one split of the icons source, each decoded once, when it is first asked for: (name, image of mode L).

    Attributes:
      names: of all.
    """

    def __init__(self, data_dir: str | Path, split: str):
        self.found = records.open_split(Path(data_dir) / icons.NAME, icons.VERSION, split).with_descriptions()
        self.decoded = [None] * len(self.found)
        self.names = [self.found.described(row)["query"]["text"] for row in range(len(self.found))]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, row: int) -> tuple[str, Image.Image]:
        if self.decoded[row] is None:
            self.decoded[row] = Image.open(io.BytesIO(self.found[row]["positive"]["image"])).convert("L")
        return self.names[row], self.decoded[row]


class Pages(Sequence):
    """Training pages, composed when asked for.

    Every epoch deals out all icons anew, `MOST` to a page; how many of them the page shows depends on the step, by the curriculum.
    So two pages of an epoch never share an icon, and a page that does not answer a query rarely shows what it names.

    Args:
      page_side: pixels; a smaller page than the fixed ones' is cheaper to learn from while it shows few icons.
      curriculum: ((until step, fewest icons, most icons), ...), by rising step; the last entry holds for ever, whatever its step.
        Empty: 4 to 9.

    Raises:
      UserError: a curriculum that cannot be followed, or too few drawings for a page.
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
                raise UserError(f"config.data.curriculum={self.curriculum}: icons of a page must be 1 <= fewest <= most <= {MOST}")
        steps = [until for until, _, _ in self.curriculum[:-1]]
        if steps != sorted(steps):
            raise UserError(f"config.data.curriculum={self.curriculum}: its steps (but the last, which does not count) must rise")
        if len(drawings) < MOST:
            raise UserError(f"boards: {len(drawings)} training icons are too few for a page of {MOST}")
        self._dealt = (-1, None)

    def __len__(self) -> int:
        """Pages of an epoch."""
        return len(self.drawings) // MOST

    def __getitem__(self, row: int) -> dict:
        return self.compose(row, 0, 0)

    def icons_at(self, step: int) -> tuple[int, int]:
        """Fewest and most icons of a page at a step."""
        return next((bounds for until, *bounds in self.curriculum[:-1] if step < until), self.curriculum[-1][1:])

    def compose(self, row: int, epoch: int, step: int) -> dict:
        text, dealt, random = self._chosen(row, epoch, step)
        page = compose([self.drawings[number][1] for number in dealt], random, self.page_side)
        return self._record(text, page)

    def described(self, row: int, epoch: int, step: int) -> dict:
        """The record that `compose` makes, with (width, height) in place of its page, which is not drawn."""
        text, _, _ = self._chosen(row, epoch, step)
        return self._record(text, (self.page_side, self.page_side))

    def _chosen(self, row: int, epoch: int, step: int) -> tuple[str, list[int], np.random.Generator]:
        """The query of a page, the numbers of its icons, and the random numbers that it is drawn with."""
        random = np.random.default_rng([self.seed, epoch, row])
        fewest, most = self.icons_at(step)
        count = int(random.integers(fewest, most, endpoint=True))
        dealt = self._deal(epoch)[row * MOST : row * MOST + count].tolist()
        return name_some([self.drawings.names[number] for number in dealt], random), dealt, random

    def _record(self, text: str, image: Image.Image | tuple[int, int]) -> dict:
        return {"query": {"text": text}, "positive": {"image": image}, "negatives": [], "source": NAME}

    def _deal(self, epoch: int) -> np.ndarray:
        dealt = self._dealt  # read once: several threads compose, and one may be an epoch ahead
        if dealt[0] != epoch:
            dealt = self._dealt = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.drawings))
        return dealt[1]


def deal_fixed(names: Sequence[str], random: np.random.Generator) -> list[list[int]]:
    """Which icons lie on which fixed page: `FEWEST` to `MOST` on each, every icon on `ROUNDS` pages, no name twice on a page.

    Raises:
      UserError: too few icons, or too few names among them, for such pages.
    """
    pages = []
    for _ in range(ROUNDS):
        dealt = next(filter(None, (_deal_round(names, random) for _ in range(100))), None)
        if dealt is None:
            raise UserError(f"boards: {len(names)} icons of {len(set(names))} names do not fill pages of {FEWEST} to {MOST}")
        pages += dealt
    return pages


def _deal_round(names: Sequence[str], random: np.random.Generator) -> list[list[int]] | None:
    """Deals every icon to one page; None where the last ones share a name and so find no page together."""
    pages, left = [], random.permutation(len(names)).tolist()
    while left:
        # A page may take any number that leaves none, or enough for another page.
        sizes = [size for size in range(FEWEST, MOST + 1) if len(left) == size or len(left) - size >= FEWEST]
        size, page = int(random.choice(sizes)) if sizes else 0, []
        for number in left:
            if len(page) < size and all(names[number] != names[other] for other in page):
                page.append(number)
        if not page or len(page) < size:
            return None
        pages.append(page)
        chosen = set(page)
        left = [number for number in left if number not in chosen]
    return pages


def fixed_pages(drawings: Sequence[tuple[str, Image.Image]], split: str) -> Iterator[dict]:
    """The records of a split's fixed pages."""
    random = np.random.default_rng([PAGE_SEED, records.SPLITS.index(split)])
    names = [name for name, _ in drawings]
    for page in tqdm(deal_fixed(names, random), desc=f"boards: composing {split} pages", unit="page", mininterval=0.5):
        png = io.BytesIO()
        compose([drawings[number][1] for number in page], random).save(png, "png")
        text = SEPARATOR.join(names[number] for number in page)
        yield {"query": {"text": text}, "positive": {"image": png.getvalue()}, "source": NAME}


class Boards(tfds.core.GeneratorBasedBuilder):
    """Writes the fixed pages as ArrayRecord."""

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(self, *, pages: dict[str, list[dict]] = (), **kwargs):
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
    """Prepares the icons and writes the fixed pages to `data_dir`/boards; already done, does nothing.

    Returns:
      The marker: {"version", "fingerprint", "pages"}. It is written last: killed before that, the next call starts anew.
    """
    base = icons.prepare(data_dir)
    directory = Path(data_dir) / NAME
    if (marker := records.read_marker(directory, VERSION)) and marker["icons"] == base["fingerprint"]:
        return marker
    pages = {split: list(fixed_pages(Drawings(data_dir, split), split)) for split in ("validation", "test")}
    records.write(Boards(pages=pages, data_dir=str(data_dir), file_format="array_record"))
    digest = hashlib.sha256()
    for record in (record for split in pages for record in pages[split]):
        digest.update(record["query"]["text"].encode() + b"\0" + hashlib.sha256(record["positive"]["image"]).digest())
    marker = {
        "version": VERSION,
        "fingerprint": digest.hexdigest()[:16],
        "icons": base["fingerprint"],
        "pages": {split: len(found) for split, found in pages.items()},
    }
    shutil.copyfile(Path(data_dir) / icons.NAME / "tokenizer.json", directory / "tokenizer.json")  # the same words
    records.write_marker(directory, marker)
    print(f"boards: pages {marker['pages']}, fingerprint {marker['fingerprint']}")
    return marker


def training(data: DataConfig, seed: int) -> Pages:
    """Training pages, by `config.data.curriculum` and `config.data.page_side`."""
    return Pages(Drawings(data.dir, "train"), seed, data.curriculum, data.page_side)


def retrieval(data_dir: str | Path, split: str) -> records.Retrieval:
    """A split as a search task: a query for every name of the split, and one for two names of each page.

    Relevant is every page that shows all the names of the query.
    """
    found = records.open_split(Path(data_dir) / NAME, VERSION, split)
    pages = [(record["query"]["text"].split(SEPARATOR), record["positive"]["image"]) for record in found]
    holders: dict[str, set[int]] = {}
    for number, (names, _) in enumerate(pages):
        for name in names:
            holders.setdefault(name, set()).add(number)
    random = np.random.default_rng(PAGE_SEED)
    pairs = {tuple(names[number] for number in random.permutation(len(names))[:2]) for names, _ in pages}
    queries = [(name,) for name in sorted(holders)] + sorted(pairs)
    relevance = [set.intersection(*(holders[name] for name in query)) for query in queries]
    return records.Retrieval(
        [{"text": SEPARATOR.join(query)} for query in queries], [{"image": image} for _, image in pages], relevance
    )
