"""A self-contained HTML page of an evaluation: tables, a plot of quality against cost, the worst queries with their pictures.

The page fetches nothing and runs nothing: pictures are data URIs, and a content policy forbids all else. Texts and images of items
are not trusted: texts are escaped and cut, images are decoded within bounds and written again as thumbnails. The same results give
the same bytes.
"""

import base64
import io
import unicodedata
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from metaembed_jax.evaluation.failures import SHOWN, FailedQuery
from metaembed_jax.evaluation.tables import Table
from metaembed_jax.files import write_bytes
from metaembed_jax.inputs.images import open_image

SIDE = 256  # pixels of a thumbnail's longest side
LONGEST = 300  # characters that are shown of a text
LONGEST_WORD = 30  # a longer one may be cut in the middle

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2 }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem }
small, footer { opacity: .75 }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums }
caption { padding-bottom: .5rem; text-align: left }
caption strong { display: block }
th, td { padding: .15rem .75rem; text-align: right; white-space: nowrap }
tr > :first-child { text-align: left; padding-left: 0 }
tbody { border-top: 1px solid #8886 }
tbody th { font-weight: normal }
img { display: block; max-width: 100%; height: auto; background: #fff }
article { border-top: 1px solid #8886 }
.items { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { width: 12.5rem; margin: 0 }
figure.plot { width: auto }
figcaption { font-weight: bold }
figure p { margin: .25rem 0; overflow-wrap: anywhere }
footer { margin-top: 3rem; border-top: 1px solid #8886; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem }
dd { margin: 0 }
"""


def write_html(
    path: Path, title: str, tables: Sequence[Table], plot: bytes | None, failures: Sequence[FailedQuery], facts: dict[str, str]
) -> None:
    """Write the page; an older one is replaced as a whole.

    Args:
      title: the model and the data.
      plot: a PNG, if there is one.
      failures: the worst queries, worst first.
      facts: names and values for the end of the page, such as the versions of packages.

    Raises:
      UserError: an image that cannot be read, or a path that cannot be written.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        *map(_table, tables),
        _plot(plot) if plot else "",
        _failures(failures),
        f"<footer><dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in facts.items())}</dl></footer>",
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    lines = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>", ""]
    write_bytes(path, "\n".join(lines).encode(errors="replace"))  # names of files may have surrogates


def _table(table: Table) -> str:
    caption = f"<caption><strong>{escape(table.title)}</strong>{escape(table.legend)}</caption>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    bodies = "".join(f"<tbody>{''.join(map(_row, body))}</tbody>" for body in table.bodies)
    notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in table.notes)
    return f'<div class="wide" tabindex="0"><table>{caption}<thead><tr>{head}</tr></thead>{bodies}</table></div>{notes}'


def _plot(encoded: bytes) -> str:
    image = _image(encoded, "png", "quality against cost; the tables hold the numbers of this plot")
    return f'<figure class="plot">{image}</figure>'


def _row(cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{escape(cells[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])}</tr>'


def _failures(failures: Sequence[FailedQuery]) -> str:
    if not failures:
        return "<h2>Worst queries</h2><p>At the largest budget, every query found what it looked for.</p>"
    legend = (
        "By the rank, at the largest budget, of the first document that is right; it ranks behind all others of its score. "
        f"Of what is right, and of what was found before it, up to {SHOWN} documents are shown."
    )
    return f"<h2>Worst queries</h2><p>{legend}</p>" + "".join(_failure(*pair) for pair in enumerate(failures, start=1))


def _failure(number: int, failure: FailedQuery) -> str:
    name = f"worst query {number}"
    figures = [_item(failure.query, "looked for", f"{name}: what was looked for")]
    for kind, items in (("right", failure.right), ("found", failure.above)):
        for position, (item, score) in enumerate(items, start=1):
            figures.append(_item(item, f"{kind} · score {score:.3f}", f"{name}: {kind}, {position}"))
    head = f"<h3>{number}. Rank {failure.rank + 1:,} of {failure.among:,} <small>{escape(failure.origin)}</small></h3>"
    return f'<article>{head}<div class="items">{"".join(figures)}</div></article>'


def _item(item: dict, caption: str, name: str) -> str:
    """Return a figure of an item's image and text.

    Args:
      name: the alternative text of the image.
    """
    image = _image(_thumbnail(item["image"], name), "jpeg", name) if item.get("image") else ""
    # The language and direction of the text may differ from the page's.
    text = f'<p lang="" dir="auto">{escape(shortened(item["text"]))}</p>' if item.get("text") else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{image}{text}</figure>"


def _image(encoded: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(encoded).decode()}">'


def _thumbnail(image: Any, name: str) -> bytes:
    """Return a small JPEG of anything that `open_image` opens, without its metadata."""
    small = open_image(image, name).copy()  # `thumbnail` changes the image in place
    small.thumbnail((SIDE, SIDE))
    small.info.clear()
    content = io.BytesIO()
    small.save(content, "jpeg", quality=85)
    return content.getvalue()


def shortened(text: str) -> str:
    """Return a text in one line, cut to `LONGEST` characters and "…"; it is cut inside a word only if that exceeds `LONGEST_WORD`.

    Control codes and halves of surrogate pairs become U+FFFD.
    """
    line = " ".join(text.split())
    if len(line) > LONGEST:
        whole, _, begun = line[: LONGEST + 1].rpartition(" ")
        line = (whole if len(begun) <= LONGEST_WORD else line[:LONGEST]) + "…"
    return "".join("\ufffd" if unicodedata.category(character) in ("Cc", "Cs") else character for character in line)
