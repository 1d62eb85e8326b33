"""Strings of the second format, written by hand from the benchmark's description."""

import pytest

from metaembed_jax.data.sources.mmeb import marked_item
from metaembed_jax.evaluation.mmeb.strings import query_string, target_string
from metaembed_jax.evaluation.mmeb.tasks import GROUPS, TASKS

BY_NAME = {task.name: task for task in TASKS}
IMG = "<|image_1|>"


@pytest.mark.parametrize(
    "task, instruction, text, string",
    [
        (
            "ImageNet-1K",
            IMG + " Represent the given image for classification",
            "",
            f"{IMG}  Represent the given image for classification\n",
        ),
        ("N24News", IMG + "\nRepresent the news: ", "A headline", f"{IMG}\nRepresent the news:  A headline\n"),
        ("MSCOCO_i2t", IMG + "\nFind a caption. \n", "", f"{IMG}\nFind a caption.\n\n"),
        ("VisualNews_i2t", "Find a caption", "", f"{IMG} Find a caption\n"),
        ("ChartQA", IMG + " Answer the question: ", "How many?", f"{IMG}\nAnswer the question: How many?\n"),
        ("ChartQA", IMG + "\nAnswer:\n", "a \nb", f"{IMG}\nAnswer: a\nb\n"),
        ("CIRR", IMG + " Find the same but: ", "in red", f"{IMG}\nFind the same but: in red\n"),
        ("NIGHTS", IMG + " Find the like.", "", f"{IMG}\nFind the like.\n"),
        ("RefCOCO", IMG + " Select the object: ", '"left dog"', f'{IMG}\nSelect the object: "left dog"\n'),
        ("MSCOCO_t2i", "Find an image: ", "a dog", "Find an image:  a dog\n"),
        ("VisDial", "Find by dialogue:", "Q: a? A: b", "Find by dialogue: Q: a? A: b\n\n"),
        ("Wiki-SS-NQ", "Find the document:", "who \nwas", "Find the document: who \nwas\n"),
    ],
)
def test_queries(task, instruction, text, string):
    assert query_string(BY_NAME[task], instruction, text) == string


@pytest.mark.parametrize(
    "task, instruction, caption, captioned, string",
    [
        ("ImageNet-1K", "", "tench, Tinca tinca", True, "tench, Tinca tinca"),
        ("TextVQA", "", " 42 \n", True, " 42 \n"),
        ("VisualNews_i2t", "", "A caption.", True, "A caption."),
        ("MSCOCO_t2i", IMG + " Represent the given image.", "", False, f"{IMG}  Represent the given image.\n"),
        ("WebQA", IMG + "\nRepresent:", "Page 3", True, f"{IMG}\nRepresent: Page 3\n"),
        ("EDIS", IMG + "\nRepresent:", "", True, f"{IMG}\nRepresent: \n"),
        ("CIRR", IMG + "\nRepresent the given image.", "", False, f"{IMG}\nRepresent the given image."),
        ("Visual7W-Pointing", IMG + " Represent the cut.", "", False, f"{IMG}  Represent the cut."),
        ("RefCOCO-Matching", IMG + "\nSelect:", '"dog"', True, f'{IMG}\nSelect: "dog"\n'),
    ],
)
def test_targets(task, instruction, caption, captioned, string):
    assert target_string(BY_NAME[task], instruction, caption, captioned) == string


def test_what_the_model_gets_has_no_mark():
    assert marked_item("qry_text", f"{IMG}\nAnswer: a\n", "a.jpg", str) == {"text": "Answer: a\n", "image": "a.jpg"}


def test_there_are_36_tasks():
    assert len(TASKS) == len(BY_NAME) == 36 and sum(task.in_domain for task in TASKS) == 20
    assert [sum(task.group == group for task in TASKS) for group in GROUPS] == [10, 10, 12, 4]
