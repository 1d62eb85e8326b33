"""A task of the shape of ViDoRe's: questions for noise pages of different sizes, of graded relevance, in two languages."""

import io

import numpy as np
from datasets import Dataset, Image
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image as PIL

SIZES = ((60, 90), (150, 60), (84, 84), (30, 200))
FACTS = dict(
    description="noise",
    reference=None,
    dataset={"path": "noise/pages", "revision": "1"},
    type="DocumentUnderstanding",
    category="t2i",
    modalities=["text", "image"],
    eval_splits=["test"],
    eval_langs={"english": ["eng-Latn"], "french": ["fra-Latn"]},
    main_score="ndcg_at_5",
    date=None,
    domains=None,
    task_subtypes=None,
    license=None,
    annotations_creators=None,
    dialect=None,
    sample_creation=None,
    bibtex_citation="",
)


def picture(number: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An encoded page."""
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[number % 4], 3), np.uint8)
    file = io.BytesIO()
    PIL.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def table(images, **columns) -> Dataset:
    """A corpus or queries with images as they are delivered: encoded, in the rows."""
    columns = {"image": [image and {"bytes": image, "path": None} for image in images], **columns}
    return Dataset.from_dict(columns).cast_column("image", Image())


class Pages(AbsTaskRetrieval):
    """12 pages, the same in both languages, and 8 questions; the last has no answer.

    Attributes:
      per_query: what pytrec_eval found, by subset.
    """

    metadata = TaskMetadata(name="NoisePages", **FACTS)

    def load_data(self, num_proc=None, **_):
        self.per_query, random = {}, np.random.default_rng(0)
        grades = np.where(random.random((8, 12)) < 0.3, random.integers(0, 4, (8, 12)), -1)
        grades[:7, 3], grades[7] = 2, -1
        self.dataset = {subset: {"test": self.split(subset, grades)} for subset in self.hf_subsets}
        self.data_loaded = True

    def split(self, subset, grades):
        """The data of `AbsTaskRetrieval`."""
        texts = [f"{subset} question {number} où?" for number in range(8)]
        pages = [picture(n, ("RGB", "RGBA", "L", "P")[n % 4]) for n in range(12)]
        judged = {f"q{q}": {f"p{n}": int(g) for n, g in enumerate(row) if g >= 0} for q, row in enumerate(grades)}
        return {
            "corpus": table(pages, id=[f"p{n}" for n in range(12)]),
            "queries": Dataset.from_dict({"id": [f"q{n}" for n in range(8)], "text": texts}),
            "relevant_docs": judged,
            "top_ranked": None,
        }

    def task_specific_scores(self, scores, qrels, results, hf_split, hf_subset):
        """Keeps what `evaluate` rounds."""
        self.per_query[hf_subset] = scores
        return {}


class OtherPages(Pages):
    metadata = TaskMetadata(name="OtherPages", **FACTS | {"main_score": "ndcg_at_10"})


class MorePages(Pages):
    metadata = TaskMetadata(name="MorePages", **FACTS)
