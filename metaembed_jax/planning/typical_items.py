"""Items of typical sizes for the sources of the published recipe, to plan rows without data.

Sizes follow the data sets' publications and MMEB's layout of them (which side has images, how long instructions and texts are).
They are not measured. Training plans its rows from the prepared data.
"""

from typing import NamedTuple

import numpy as np

TOKENS_PER_WORD = 1.3  # English prose with its punctuation, in a vocabulary of 150,000


class _Sides(NamedTuple):
    """Kinds of images (None for no image), and the fewest and most words, of queries and of documents.

    Attributes:
      query_image, query_words: image and words of queries.
      image, words: image and words of documents.
    """

    query_image: str | None
    query_words: tuple[int, int]
    image: str | None
    words: tuple[int, int]


# kind: (share, width, height, spread); spread is the standard deviation of the logarithms of area and aspect ratio
_IMAGES = {
    "coco": ((0.36, 640, 480, 0), (0.28, 640, 427, 0.02), (0.2, 480, 640, 0), (0.1, 427, 640, 0.02), (0.06, 500, 375, 0.1)),
    "voc": ((0.6, 500, 375, 0), (0.2, 500, 333, 0), (0.2, 375, 500, 0)),
    "web": ((0.7, 500, 375, 0.25), (0.3, 375, 500, 0.25)),
    "scene": ((0.8, 700, 500, 0.4), (0.2, 500, 650, 0.4)),
    "photo": ((0.75, 1000, 700, 0.3), (0.25, 700, 950, 0.3)),
    "news": ((0.75, 768, 512, 0.2), (0.25, 512, 700, 0.2)),
    "square": ((1.0, 512, 512, 0),),
    "crop": ((1.0, 180, 180, 0.7),),
    "meme": ((0.6, 825, 550, 0.1), (0.4, 550, 700, 0.15)),
    "chart": ((0.7, 850, 600, 0.15), (0.3, 420, 560, 0.2)),
    "figure": ((1.0, 1000, 600, 0.4),),
    "page": ((0.7, 1700, 2200, 0.03), (0.2, 1654, 2339, 0), (0.1, 2200, 1700, 0.1)),
    "infographic": ((1.0, 1000, 2600, 0.35),),
    "pages": ((0.65, 1700, 2200, 0.05), (0.15, 1600, 1000, 0.1), (0.1, 1000, 2600, 0.35), (0.1, 1000, 600, 0.4)),
    "slides": ((0.4, 1700, 2200, 0.05), (0.3, 1500, 1000, 0.2), (0.2, 850, 600, 0.2), (0.1, 1000, 2600, 0.35)),
}

_INSTRUCTION = (5, 6)  # "Represent the given image."
_SOURCES = {
    "colpali": _Sides(None, (8, 25), "pages", (0, 0)),
    "visrag": _Sides(None, (8, 25), "slides", (0, 0)),
    "MSCOCO": _Sides("coco", (14, 17), "crop", (8, 12)),
    "ImageNet_1K": _Sides("web", (8, 9), None, (1, 3)),
    "MSCOCO_i2t": _Sides("coco", (8, 12), None, (8, 15)),
    "MSCOCO_t2i": _Sides(None, (18, 26), "coco", _INSTRUCTION),
    "VisualNews_i2t": _Sides("news", (10, 14), None, (12, 30)),
    "VisualNews_t2i": _Sides(None, (22, 40), "news", _INSTRUCTION),
    "A-OKVQA": _Sides("coco", (14, 22), None, (1, 3)),
    "CIRR": _Sides("photo", (20, 36), "photo", _INSTRUCTION),
    "ChartQA": _Sides("chart", (14, 28), None, (1, 2)),
    "DocVQA": _Sides("page", (14, 24), None, (1, 5)),
    "InfographicsVQA": _Sides("infographic", (16, 28), None, (1, 3)),
    "N24News": _Sides("news", (50, 110), None, (1, 2)),
    "VisDial": _Sides(None, (80, 140), "coco", _INSTRUCTION),
    "Visual7W": _Sides("coco", (12, 20), None, (1, 6)),
    "WebQA": _Sides(None, (20, 40), "photo", (20, 50)),
    "ArxivQA": _Sides("figure", (25, 60), None, (5, 20)),
    "InfoSeek_it2it": _Sides("photo", (16, 26), "photo", (90, 130)),
    "InfoSeek_it2t": _Sides("photo", (16, 26), None, (90, 130)),
    "TAT-DQA": _Sides("page", (18, 34), None, (1, 8)),
    "NIGHTS": _Sides("square", (10, 14), "square", _INSTRUCTION),
    "HatefulMemes": _Sides("meme", (14, 30), None, (1, 1)),
    "OK-VQA": _Sides("coco", (14, 20), None, (1, 2)),
    "SUN397": _Sides("scene", (8, 9), None, (1, 3)),
    "VOC2007": _Sides("voc", (8, 9), None, (1, 1)),
    "icons": _Sides(None, (2, 6), "square", (0, 0)),
    "boards": _Sides(None, (4, 12), "square", (0, 0)),
}
_UNKNOWN = _Sides("photo", (10, 30), "photo", (10, 60))


def typical_pair(name: str, rng: np.random.Generator) -> tuple[dict, dict]:
    """Draw a query and its document from a source of the recipe; an unknown source has photos and short texts on both sides.

    Returns:
      Items {"text": str, "image": (width, height) or None}. A text has one word for each token.
    """
    sides = _SOURCES.get(name, _UNKNOWN)
    return _item(sides.query_image, sides.query_words, rng), typical_document(name, rng)


def typical_document(name: str, rng: np.random.Generator) -> dict:
    """Draw only a document, such as a hard negative, as `typical_pair` does."""
    sides = _SOURCES.get(name, _UNKNOWN)
    return _item(sides.image, sides.words, rng)


def _item(kind: str | None, words: tuple[int, int], rng: np.random.Generator) -> dict:
    tokens = round(TOKENS_PER_WORD * rng.uniform(*words))
    return {"text": " ".join(["word"] * tokens), "image": kind and _width_height(kind, rng)}


def _width_height(kind: str, rng: np.random.Generator) -> tuple[int, int]:
    options = _IMAGES[kind]
    bounds = np.cumsum([share for share, *_ in options])
    _, width, height, spread = options[min(int(np.searchsorted(bounds, rng.random())), len(options) - 1)]
    scale, stretch = np.exp(rng.normal(0, spread / 2, 2)) if spread else (1.0, 1.0)
    return max(28, round(width * scale * stretch**0.5)), max(28, round(height * scale / stretch**0.5))
