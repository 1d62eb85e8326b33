"""Packed rows: the sizes of items, the rows that hold them, and the arrays of a batch."""
