"""The 36 tasks of MMEB: their groups, domains (MMEB-train or not), and kinds of queries and documents."""

import dataclasses

GROUPS = ("classification", "vqa", "retrieval", "grounding")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name: name of its folder.
      group: one of `GROUPS`.
      in_domain: MMEB-train has a subset of the task.
      kind: "i2t": image to text; "qa": image and question to text; "t2i": text to image; "i2i": image, with or without text, to
        image.
    """

    name: str
    group: str
    in_domain: bool
    kind: str


def _tasks(group: str, in_domain: bool, **names: str) -> list[Task]:
    return [Task(name, group, in_domain, kind) for kind, listed in names.items() for name in listed.split()]


TASKS = (
    *_tasks("classification", True, i2t="ImageNet-1K N24News HatefulMemes VOC2007 SUN397"),
    *_tasks("classification", False, i2t="Place365 ImageNet-A ImageNet-R ObjectNet Country211"),
    *_tasks("vqa", True, qa="OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W"),
    *_tasks("vqa", False, qa="ScienceQA VizWiz GQA TextVQA"),
    *_tasks("retrieval", True, t2i="VisDial VisualNews_t2i MSCOCO_t2i WebQA", i2t="VisualNews_i2t MSCOCO_i2t", i2i="CIRR NIGHTS"),
    *_tasks("retrieval", False, t2i="Wiki-SS-NQ EDIS", i2i="FashionIQ OVEN"),
    *_tasks("grounding", True, i2i="MSCOCO"),
    *_tasks("grounding", False, i2i="RefCOCO RefCOCO-Matching Visual7W-Pointing"),
)
