"""The strings of MMEB's second format, byte for byte as in the benchmark's own evaluation.

The first format has complete strings. In the second (`ziyjiang/MMEB_Test_Instruct`) an instruction, a text and the mark of an image
are joined, and blanks before the end of a line are removed, which gives the strings of the first format:

    i2t, query       IMG + " " + instruction + " " + text, then "\\n"          target: the text as it is
    qa, i2i, query   the same, the instruction stripped and after a "\\n"      target of qa: the text as it is
    t2i, query       instruction + " " + text + "\\n"; of VisDial with a second "\\n"
    target image     IMG + " " + instruction [+ " " + caption] + "\\n"; of i2i without a caption no "\\n"
"""

from metaembed_jax.data.sources.mmeb import MARK
from metaembed_jax.evaluation.mmeb.tasks import Task


def query_string(task: Task, instruction: str, text: str) -> str:
    """Return the text of a query, with the mark of its image."""
    if task.kind == "t2i":
        return f"{instruction.replace(MARK, '')} {text}\n" + ("\n" if task.name == "VisDial" else "")
    instruction = instruction.replace(MARK, "")
    if task.kind in ("qa", "i2i"):
        instruction = "\n" + instruction.strip()
    return _joined(instruction, text) + "\n"


def target_string(task: Task, instruction: str, caption: str, captioned: bool) -> str:
    """Return the text of a document, with the mark of its image.

    Args:
      captioned: the targets of the query have captions; its first target decides.
    """
    if task.kind in ("i2t", "qa"):
        return caption
    instruction = instruction.replace(MARK, "")
    if captioned:
        return _joined(f"{instruction} {caption}", "") + "\n"
    return _joined(instruction, "") + ("\n" if task.kind == "t2i" else "")


def _joined(instruction: str, text: str) -> str:
    return f"{MARK} {instruction}{' ' + text if text else ''}".replace(" \n", "\n")
