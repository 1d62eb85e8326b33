"""What the evaluation on a benchmark leaves: NAME.json has its figures, NAME.txt its tables, NAME.html is its page."""

from collections.abc import Sequence
from pathlib import Path

from metaembed_jax.evaluation.page import write_page
from metaembed_jax.evaluation.records import write_json
from metaembed_jax.evaluation.tables import Table, as_text
from metaembed_jax.evaluation.worst import Example
from metaembed_jax.files import write_bytes


def write_benchmark(
    out: Path,
    name: str,
    title: str,
    figures: dict,
    tables: Sequence[Table],
    picture: bytes | None,
    worst: Sequence[Example],
    about: dict[str, str],
) -> None:
    """Writes the three files to `out`; for the first host alone.

    Args:
      name: of the files.
      figures: what the JSON holds.
      title, tables, picture, worst, about: as `page.write_page` takes them.

    Raises:
      UserError: as `page.write_page`.
    """
    write_json(out / f"{name}.json", figures)
    write_bytes(out / f"{name}.txt", ("\n\n".join(map(as_text, tables)) + "\n").encode(errors="replace"))
    write_page(out / f"{name}.html", title, tables, picture, worst, about)
