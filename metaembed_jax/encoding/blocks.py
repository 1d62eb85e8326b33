"""Blocks of consecutive items: vectors and failures are collected in any order, and a block is complete when none is missing.

N items of a block, n of this host, R vectors of an item, D width of a vector.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax import hosts
from metaembed_jax.encoding.reading import FAILED


class EncodedBlock(NamedTuple):
    """Vectors of this host's share of consecutive items.

    Attributes:
      items: the numbers of all items of the block.
      numbers: the numbers of this host's items, ascending. No other host has them, and none of them failed.
      vectors: the vectors of each of this host's items.
      failures: the numbers of the items that failed, of all hosts, each with a reason of one line.
    """

    items: range
    numbers: Int[np.ndarray, "n"]
    vectors: Float[np.ndarray, "n R D"]
    failures: dict[int, str]


class PendingBlock:
    """A block that is being encoded; sizes and vectors arrive in any order.

    Args:
      items: the numbers of its items.
      shape: (R, D) of its vectors.

    Attributes:
      items: as the argument.
      failures: the reasons of the failures that this host found.
    """

    def __init__(self, items: range, shape: tuple[int, int]):
        self.items, self.failures, self._shape, self._missing = items, dict[int, str](), shape, len(items)
        self._prompts_N2 = np.zeros((len(items), 2), np.int32)
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def is_complete(self) -> bool:
        """True if all hosts have the vectors of all their items."""
        return not self._missing

    def add_sizes(self, chunk: range, sizes_N4: Int[np.ndarray, "N 4"]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n 4"]]:
        """Add the sizes of consecutive items, rows of `Fitted`; return the numbers and sizes of those that did not fail."""
        first, is_good_N = chunk.start - self.items.start, sizes_N4[:, 0] != FAILED.tokens
        self._prompts_N2[first : first + len(chunk)] = sizes_N4[:, :2]
        self._missing -= int((~is_good_N).sum())
        return np.array(chunk)[is_good_N], sizes_N4[is_good_N]

    def prompt(self, number: int) -> tuple[int, int]:
        """Return the tokens (without Meta Tokens) and patches of an item."""
        tokens, patches = self._prompts_N2[number - self.items.start].tolist()
        return tokens, patches

    def add_vectors(self, count: int, numbers_n: Int[np.ndarray, "n"], vectors_nRD: Float[np.ndarray, "n R D"]) -> None:
        """Add the vectors of a call.

        Args:
          count: the items of the call, on all hosts.
          numbers_n: the numbers of this host's items.
          vectors_nRD: the vectors of each of them.
        """
        self._missing -= count
        self._arrays.append((numbers_n, vectors_nRD))

    def join(self) -> EncodedBlock:
        """Return the vectors in the order of items."""
        numbers_n = np.concatenate([np.zeros(0, np.int64), *(numbers_n for numbers_n, _ in self._arrays)])
        order_n = np.argsort(numbers_n)
        slots_n = np.argsort(order_n)
        vectors_nRD, last = np.empty((len(numbers_n), *self._shape), np.float32), len(numbers_n)
        while self._arrays:  # an array is dropped as soon as it is copied, so that memory never holds all vectors twice
            numbers, vectors = self._arrays.pop()
            vectors_nRD[slots_n[last - len(numbers) : last]] = vectors
            last -= len(numbers)
        return EncodedBlock(self.items, numbers_n[order_n], vectors_nRD, {})

    def join_without_failures(self) -> EncodedBlock:
        """Return the vectors in the order of items, without items that failed on any host. All hosts must call this."""
        reasons = {int(number): reason for number, reason in hosts.gather_dicts(self.failures).items()}
        failures, block = dict(sorted(reasons.items())), self.join()
        is_good_n = ~np.isin(block.numbers, list(failures))
        if is_good_n.all():  # no copy; false only where another host failed on an item of a row that both have
            return block._replace(failures=failures)
        return EncodedBlock(block.items, block.numbers[is_good_n], block.vectors[is_good_n], failures)
