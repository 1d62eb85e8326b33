"""Documents that cannot be read, which `--skip` leaves out of an index."""

from collections.abc import Sequence
from typing import NamedTuple

from metaembed_jax.errors import UserError


class LeftOut(NamedTuple):
    """A document that is left out.

    Attributes:
      id: id of the document; of a PDF or TIFF file that cannot be opened, the id that its only page would have.
      reason: one line that names the file or row, and what is wrong.
    """

    id: str
    reason: str


def check_left_out(left_out: Sequence[LeftOut], skip: int) -> None:
    """Check that at most `skip` documents are left out.

    Raises:
      UserError: there are more; names the first, and their number.
    """
    if type(skip) is not int or skip < 0:
        raise UserError(f"skip={skip!r}: expected a non-negative integer")
    if len(left_out) > skip:
        count = f"; {len(left_out):,} documents so far cannot be read" if len(left_out) > 1 else ""
        raise UserError(f"{left_out[0].reason}{count}; --skip={len(left_out)} leaves out as many, and lists them")
