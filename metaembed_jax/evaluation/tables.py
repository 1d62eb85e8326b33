"""Tables of results, which a terminal and a page show alike."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table whose first column names the row, and whose other cells are numbers, already written out.

    Attributes:
      title: what it is of, one line.
      about: what the numbers mean, for those who see nothing but the page.
      head: names of the columns.
      bodies: groups of rows, each as long as `head`.
      notes: lines below it.
    """

    title: str
    about: str
    head: Sequence[str]
    bodies: Sequence[Sequence[Sequence[str]]]
    notes: Sequence[str] = ()


def as_text(table: Table) -> str:
    """The title, the aligned rows, a blank line between groups, and the notes."""
    lines = [table.head, *(row for body in table.bodies for row in body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(rows):
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )

    first, *others = table.bodies
    return "\n".join([table.title, "\n\n".join([aligned([table.head, *first]), *map(aligned, others)]), *table.notes])
