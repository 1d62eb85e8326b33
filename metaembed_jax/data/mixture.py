"""What each step trains on, before anything is read: step n is a pure function of (config, n).

Each source is shuffled anew every epoch and repeated without a gap (by grain, which makes that random access), and cut into
sub-batches. A step has the same number of sub-batches, and of rows in each shape class, whatever the step. So the mixture takes,
place by place, the source that is furthest behind its weight among those whose items still find rows in the step.

S sources, K kinds of rows: for images and for all items, of queries and of candidates.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from metaembed_jax.errors import UserError

KINDS = ("images in query_shapes", "items in query_shapes", "images in candidate_shapes", "items in candidate_shapes")


class Reference(NamedTuple):
    """A record that has not been read yet."""

    source: int
    epoch: int
    row: int


def mixture(config: ConfigDict, sources: Sequence[Sequence], room_K: Sequence[int]) -> grain.MapDataset:
    """The dataset whose element n is the list of references of step n, sub-batch by sub-batch.

    Args:
      sources: one for each entry of `config.data.sources`, in its order.
      room_K: rows of each kind that a step has.

    Raises:
      UserError: a source is empty, a weight is not positive, sizes do not divide, or the rows do not hold this mixture.
    """
    sub_batch = config.data.sub_batch or config.batch_size
    if config.batch_size % sub_batch:
        raise UserError(f"config.batch_size={config.batch_size} must be a multiple of config.data.sub_batch={sub_batch}")
    names, weights, caps = zip(*config.data.sources, strict=True)
    for name, weight, source in zip(names, weights, sources, strict=True):
        if not 0 < weight < math.inf:
            raise UserError(f"config.data.sources: the weight of {name!r} is {weight}; it must be positive, and finite")
        if not len(source):
            raise UserError(f"source {name!r} has no training records")
    used = [min(cap or len(source), len(source)) for cap, source in zip(caps, sources, strict=True)]
    references = [_references(number, len(source), used[number], config.seed) for number, source in enumerate(sources)]
    needs_SK = np.array([rows_needed(source, sub_batch, config.data.negatives) for source in sources])
    chosen = schedule(weights, needs_SK, room_K, config.batch_size // sub_batch, config.steps, names)
    places = _places(chosen)

    def step(number: int) -> list[Reference]:
        pairs = zip(chosen[number].tolist(), places[number].tolist(), strict=True)
        return [references[source][place * sub_batch + pair] for source, place in pairs for pair in range(sub_batch)]

    return grain.MapDataset.range(config.steps).map(step)


def rows_needed(source: Sequence, sub_batch: int, negatives: int) -> tuple[int, int, int, int]:
    """The most rows of each kind that a sub-batch of a source can take.

    A prepared source says in `about`, its marker, whether it has images on a side, and hard negatives; others promise nothing.
    """
    about = getattr(source, "about", {})

    def with_images(side: str) -> bool:
        return side in about and about[side]["text"] < sum(about[side].values())

    candidates = sub_batch * (1 + negatives if about.get("negatives", 1) else 1)
    return sub_batch * with_images("queries"), sub_batch, candidates * with_images("positives"), candidates


def schedule(
    weights: Sequence[float], needs_SK: Int[np.ndarray, "S K"], room_K: Sequence[int], places: int, steps: int, names: Sequence[str]
) -> Int[np.ndarray, "steps places"]:
    """The source of each sub-batch. What was chosen before a step does not depend on how many steps follow.

    Args:
      needs_SK: rows that a sub-batch of a source takes.
      room_K: rows of a step.
      places: sub-batches of a step.

    Raises:
      UserError: a source finds no rows in any step, or too rarely for its weight; says how many rows are needed on average.
    """
    share_S = np.array(weights, float) / sum(weights)
    room_K = np.array(room_K)
    least = _least_rows(needs_SK, places, room_K)
    for name, needs_K in zip(names, needs_SK, strict=True):
        if not _fits(room_K - needs_K, least, places - 1):
            raise UserError(_too_few_rows(share_S, needs_SK, room_K, places, f"has no room for {name!r}"))
    chosen, drawn_S = np.zeros((steps, places), np.int32), np.zeros(len(share_S))
    for step in range(steps):
        left_K = room_K
        for place in range(places):
            after_SK = left_K - needs_SK
            open_S = [_fits(after_K, least, places - place - 1) for after_K in after_SK]  # one is, or the last would not have been
            behind_S = share_S * (step * places + place + 1) - drawn_S
            source = int(np.argmax(np.where(open_S, behind_S, -np.inf)))
            chosen[step, place], left_K = source, after_SK[source]
            drawn_S[source] += 1
    behind_S = share_S * drawn_S.sum() - drawn_S
    late = int(np.argmax(behind_S))
    if behind_S[late] > places + len(share_S):
        drawn, wanted = drawn_S[late] / drawn_S.sum(), share_S[late]
        why = f"leaves {names[late]!r} {100 * drawn:.2f} % of the pairs where its weight asks for {100 * wanted:.2f} %"
        raise UserError(_too_few_rows(share_S, needs_SK, room_K, places, why))
    return chosen


def _fits(left_K: np.ndarray, least: list[np.ndarray], places: int) -> bool:
    """Whether so many more sub-batches find rows in what is left."""
    return bool((left_K >= 0).all() and (not least or (least[places] <= left_K).all(axis=1).any()))


def _least_rows(needs_SK: np.ndarray, places: int, room_K: np.ndarray) -> list[np.ndarray]:
    """For 0 .. places-1 sub-batches, the least sums of their rows, which no others undercut; none where all fit anyway."""
    if (needs_SK.max(axis=0) * places <= room_K).all():
        return []
    kinds = np.unique(needs_SK, axis=0)
    least = [np.zeros((1, needs_SK.shape[1]), int)]
    for _ in range(places - 1):
        sums = np.unique((least[-1][:, None] + kinds).reshape(-1, needs_SK.shape[1]), axis=0)
        undercut = [((sums <= one).all(axis=1) & (sums < one).any(axis=1)).any() for one in sums]
        least.append(sums[~np.array(undercut)])
    return least


def _too_few_rows(share_S: np.ndarray, needs_SK: np.ndarray, room_K: np.ndarray, places: int, why: str) -> str:
    means = list(zip(KINDS, share_S @ needs_SK * places, room_K.tolist(), strict=True))
    short = [one for one in means if one[1] > one[2]] or means
    listed = ", ".join(f"{mean:.1f} {kind}, for {room} rows" for kind, mean, room in short)
    return f"config.data: a step of these shape classes {why}: give the classes more rows (on average it has {listed})"


def _places(chosen: Int[np.ndarray, "steps places"]) -> Int[np.ndarray, "steps places"]:
    """For each sub-batch, how many of its source came before it."""
    flat = chosen.ravel()
    places = np.zeros(len(flat), np.int64)
    for source in np.unique(flat):
        here = flat == source
        places[here] = np.arange(here.sum())
    return places.reshape(chosen.shape)


def _references(source: int, rows: int, cap: int, seed: int) -> grain.MapDataset:
    """`cap` rows of a source, the same in every epoch (all, if it has no more), in an order of their own, for ever."""
    order_seed, choice_seed = np.random.SeedSequence([seed, source]).generate_state(2).tolist()
    chosen = np.random.default_rng(choice_seed).permutation(rows)[:cap] if cap < rows else np.arange(rows)
    shuffled = grain.MapDataset.range(cap).shuffle(seed=order_seed).repeat()
    return shuffled.map_with_index(lambda position, row: Reference(source, position // cap, int(chosen[row])))
