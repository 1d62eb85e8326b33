"""Prepare a source: turn the rows of its files into records, in shards of ArrayRecord that several processes write.

    OUT/{source}/{version}.part/            while it is written
        job.json                            the files that the copy of the corpus is of
        corpus.bin, corpus.json             the documents that rows name, if they name any
        shards/...                          see `shards`
    OUT/{source}/{version}/                 complete, and readable by TensorFlow Datasets
        pairs-train.array_record-00007-of-00098, described-train.jsonl, shards/..., prepared.json (the marker)

A shard is kept while its rows, the image files that they name and their splits are the same: a preparation that was killed resumes
with the missing shards, and a source whose files changed is prepared again where they did. `splits` chooses the rows of the splits
`validation` and `test`. Rows of a user's own source that share an item are in the same split, for which all images are read twice;
the published sets, which are 100 times as large and have test sets of their own, are divided row by row.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int
from tensorflow_datasets.core import naming
from tqdm import tqdm

from metaembed_jax import files
from metaembed_jax.data.sources import descriptions, records, shards, splits
from metaembed_jax.data.sources.candidates import NUMBERS
from metaembed_jax.data.sources.corpus import CONTENT, IMAGES, SPANS, remove_copy
from metaembed_jax.data.sources.shards import DATASET, TYPES, Job, RawSource
from metaembed_jax.data.stamps import file_stamp
from metaembed_jax.data.workers import map_with
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, locked, replacing
from metaembed_jax.inputs.images import memory_limit

VERSION = "2.1.0"
# Files in the folder of a source. Runs store the sizes of items there.
OWN = (
    *("dataset_info.json", "features.json", "job.json", records.MARKER, CONTENT, SPANS, IMAGES, shards.FOLDER),
    *(f"{DATASET}-*.array_record-*", "described-*.jsonl", "sizes-*.npy", "sizes.lock"),
)
Result = TypeVar("Result")


def prepare_source(source: RawSource, out: Path, workers: int, skips: int) -> dict:
    """Prepare a source in `out`/`source.name`; of one that is prepared already, the shards whose rows or images changed.

    Args:
      workers: number of processes next to this one.
      skips: the most bad rows to leave out, with a line for each; one more is an error.

    Returns:
      The marker: {"version", "fingerprint", "inputs" (digest of the files that were read), "files", "images" that rows name by
      path, "components" of rows that are in the same split, "rows" of each split, "held_out" numbers of different items,
      "queries" and "positives" of each type, "negatives", rows with "teacher_scores" and "labels", "bytes", "left_out" ([name of
      a row, reason], ...)}.

    Raises:
      UserError: too many rows are bad, an id occurs twice (both name the first row), the source is prepared from other files, or
        its folder has files that are not of a source.
    """
    source_dir, inputs = out / source.name, _inputs(source)
    marker = records.read_marker(source_dir, VERSION)
    if marker and marker["inputs"] == inputs and not marker["images"]:
        return _accept(marker, skips)
    source_dir.mkdir(parents=True, exist_ok=True)
    with locked(source_dir / "lock", f"{source_dir} is being prepared by another process; wait for it to end"):
        marker = records.read_marker(source_dir, VERSION)  # another process may have completed it
        return _Preparation(source, source_dir, inputs, workers, skips).run(marker)


def _inputs(source: RawSource) -> str:
    """Return a digest of the path, size and time of the files to read, but for images that they name, and of settings."""
    read = (*source.rows.files, *(source.corpus.rows.files if source.corpus else ()))
    settings = len(source.rows), shards.SHARD_ROWS, memory_limit(), source.key
    return digest(json.dumps([list(map(file_stamp, read)), *settings]).encode())


class _Preparation:
    """The steps of a preparation."""

    def __init__(self, source: RawSource, source_dir: Path, inputs: str, workers: int, skips: int):
        self.final, self.part = source_dir / VERSION, source_dir / f"{VERSION}.part"
        self.workers, self.job = workers, Job(source, self.part, skips, inputs)

    def run(self, marker: dict | None) -> dict:
        """Prepare what is not prepared, and return the marker.

        Args:
          marker: that of the source, if it is complete.
        """
        if not marker:
            _check_replaceable(self.final)
        corpus = self.job.source.corpus
        stamp = next(filter(None, map(corpus.stamp, (self.part, self.final))), "") if corpus else ""
        self.job = dataclasses.replace(self.job, corpus=stamp)
        complete = self._stored(shards.read_counts, self.final) if marker and (stamp or not corpus) else {}
        counts = self._stored(shards.read_counts, self.part, self.final) if stamp or not corpus else {}
        digests = self._stored(shards.read_digests, self.part, self.final) if self.job.source.keep_components_together else {}
        stamps = self._stamps(complete, counts, digests)
        # Shards of a later preparation that was killed do not count here: the complete source lacks them.
        is_current = len(_unchanged(complete, stamps)) == self.job.shards
        if marker and is_current and _rows_before(marker) == len(self.job.source.rows):
            return self._keep_complete(marker)
        unchanged = _unchanged(counts, stamps)
        if marker:
            self._print_changes(marker, complete, stamps, unchanged)
        if self._copy_corpus(stamp):
            unchanged = set()
        self._link_shards(unchanged)
        components = self._components({shard: stored for shard, stored in digests.items() if stored["stamps"] == stamps[shard]})
        held_out = self.job.source.held_out
        self.job = dataclasses.replace(self.job, held_out=splits.held_out(components) if held_out is None else held_out)
        written = {shard: counts[shard] for shard in unchanged if counts[shard]["held_out_rows"] == self.job.held_out_in(shard)}
        self._write(written, known=bool(marker))
        return _finish(self.job, self.final, [written[shard] for shard in range(self.job.shards)], len(np.unique(components)))

    def _keep_complete(self, marker: dict) -> dict:
        """Return the marker of a source whose rows are the same, with the files as they are now.

        Raises:
          UserError: more rows were left out than may be.
        """
        _accept(marker, self.job.skips)
        marker |= {"inputs": self.job.inputs, "files": _names(self.job.source)}
        records.write_marker(self.final.parent, marker)
        files.remove_folder(self.part)
        return marker

    def _stored(self, read: Callable[[Path, int], dict | None], *folders: Path) -> dict[int, dict]:
        """Return the content of a file of each shard, from the first folder that has it; without shards that none has."""
        stored = {shard: next(filter(None, (read(folder, shard) for folder in folders)), None) for shard in range(self.job.shards)}
        return {shard: content for shard, content in stored.items() if content is not None}

    def _stamps(self, *stored: dict[int, dict]) -> dict[int, list[int]]:
        """Return the stamps, as they are now, of the rows of all shards that are stored.

        Shards that name no image file, and whose files have the same size and time, are not read.
        """
        stamps, read = {}, []
        for shard in sorted(set().union(*stored)):
            contents = [shards_of[shard] for shards_of in stored if shard in shards_of]
            if all(content["inputs"] == self.job.whole_inputs and not content["images"] for content in contents):
                stamps[shard] = contents[0]["stamps"]
            else:
                read.append(shard)
        return stamps | self._map(shards.read_stamps, read, "looking for changes", len)

    def _map(
        self, function: Callable[[Job, int], Result], chosen: Sequence[int], what: str, rows: Callable[[Result], int]
    ) -> dict[int, Result]:
        """Return a function's result for each shard, with a bar if it takes long."""
        results, total = {}, sum(stop - start for start, stop in map(self.job.bounds, chosen))
        with tqdm(total=total, desc=f"{self.job.source.name}: {what}", unit="row", mininterval=0.5, delay=1) as bar:
            for shard, result in zip(chosen, self._each(function, chosen), strict=True):
                results[shard] = result
                bar.update(rows(result))
        return results

    def _each(self, function: Callable[[Job, int], Result], chosen: Sequence[int]) -> Iterator[Result]:
        return map_with(self.job, function, chosen, min(self.workers, len(chosen)) if len(chosen) > 1 else 0)

    def _print_changes(self, marker: dict, complete: dict[int, dict], stamps: dict[int, list[int]], unchanged: set[int]) -> None:
        """Print how many rows changed, and name the first of them.

        Args:
          complete: counts of the shards of the complete source.

        Raises:
          UserError: nothing is the same, and the source is prepared from files of other names.
        """
        rows, source = self.job.source.rows, self.final.parent
        if not unchanged and not set(marker["files"]) & set(_names(self.job.source)):
            origin = f"other files than {rows.files[0]}: {marker['files'][0]}" if marker["files"] else "mined negatives"
            raise UserError(f"{source} is prepared already, from {origin}; remove it, or choose another --out")
        changed = []
        for shard in range(self.job.shards):
            start, stop = self.job.bounds(shard)
            now = stamps.get(shard, [-1] * (stop - start))
            changed += [start + index for index in shards.changed_rows(complete.get(shard, {}).get("stamps", []), now)]
        inside = [row for row in changed if row < len(rows)]
        number = len(inside) + max(_rows_before(marker) - len(rows), 0)
        first = f", from {rows.row_name(inside[0])} on" if inside else ""
        print(f"{source}: {number:,} row{'s' * (number != 1)} changed since it was prepared (values or images){first}", flush=True)

    def _copy_corpus(self, stamp: str) -> bool:
        """Make the folder and the copy of the corpus, and return whether that changes the stamps of all rows.

        Args:
          stamp: that of the corpus, if it was copied before.
        """
        (self.part / shards.FOLDER).mkdir(parents=True, exist_ok=True)
        source, corpus = self.job.source, self.job.source.corpus
        if corpus is None:
            return False
        file, recorded = self.part / "job.json", {"inputs": self.job.inputs, "corpus": stamp}
        if not file.is_file() or files.read_json(file) != recorded:
            remove_copy(self.part)
        copy = corpus.copy(source.rows, self.part, source.name)
        source = dataclasses.replace(source, record=functools.partial(source.record, corpus=copy), corpus=None)
        new_stamp = corpus.stamp(self.part)
        files.write_json(file, recorded | {"corpus": new_stamp})
        self.job = dataclasses.replace(self.job, source=source, corpus=new_stamp)
        return new_stamp != stamp

    def _link_shards(self, unchanged: set[int]) -> None:
        """Take the shards that are the same from the complete source."""
        for shard in unchanged:
            if shards.read_counts(self.part, shard) is None:
                shards.link_shard(self.final, self.part, shard)

    def _components(self, digests: dict[int, dict]) -> Int[np.ndarray, "R"]:
        """Return the number of each row's component.

        Args:
          digests: those of shards that are the same.
        """
        if not self.job.source.keep_components_together:
            return np.arange(len(self.job.source.rows))
        missing = [shard for shard in range(self.job.shards) if shard not in digests]
        digests |= self._map(shards.write_digests, missing, "equal items", lambda content: len(content["stamps"]))
        pairs = [pair for shard in range(self.job.shards) for pair in digests[shard]["digests"]]
        return splits.components_of([pair and [*map(bytes.fromhex, pair)] for pair in pairs])

    def _write(self, written: dict[int, dict], known: bool) -> None:
        """Write the shards that are not in `written`, and add their counts to it.

        Args:
          known: say how many are kept.
        """
        job, missing = self.job, [shard for shard in range(self.job.shards) if shard not in written]
        if known:
            print(f"{self.final.parent}: {len(written)} of {job.shards} shards are kept", flush=True)
        with tqdm(total=len(job.source.rows), desc=job.source.name, unit="row", mininterval=0.5) as bar:
            bar.update(sum(counts["read"] for counts in written.values()))
            for shard, counts in zip(missing, self._each(shards.write_shard, missing), strict=True):
                written[shard] = counts
                bar.update(counts["read"])
                _check_left_out(written, job.skips)
        _check_left_out(written, job.skips)


def _check_replaceable(folder: Path) -> None:
    """Check that the folder of an incomplete source holds nothing else, because a complete one replaces it.

    Raises:
      UserError: it has other files, or is a file.
    """
    entries = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() or folder.is_symlink() else []
    if not all(files.is_unfinished(entry) or any(map(entry.match, OWN)) for entry in entries):
        raise UserError(f"{folder} exists and is not a prepared source; choose another --out or remove it")
    if (folder / records.MARKER).exists():
        print(f"{folder / records.MARKER} is damaged; the source is prepared again", flush=True)


def _unchanged(counts: dict[int, dict], stamps: dict[int, list[int]]) -> set[int]:
    """Return the shards whose rows have the same stamps as when they were written."""
    return {shard for shard, stored in counts.items() if stored["stamps"] == stamps[shard]}


def _rows_before(marker: dict) -> int:
    return sum(marker["rows"].values()) + len(marker["left_out"])


def _names(source: RawSource) -> list[str]:
    return [str(file.resolve()) for file in source.rows.files]


def _line(left_out: Sequence[str]) -> str:
    """Return a line about a row that is left out; what is wrong with a row that cannot be read names the row already."""
    row, reason = left_out
    return reason if reason.startswith(row) else f"{row}: {reason}"


def _print_left_out(left_out: Sequence[Sequence[str]]) -> None:
    for entry in left_out:
        print(f"left out: {_line(entry)}", flush=True)


def _accept(marker: dict, skips: int) -> dict:
    """Print the rows that a complete source leaves out, and return its marker.

    Raises:
      UserError: they are more than `skips`.
    """
    _check_left_out({0: marker}, skips)
    _print_left_out(marker["left_out"])
    return marker


def _check_left_out(written: dict[int, dict], skips: int) -> None:
    bad = [entry for _, counts in sorted(written.items()) for entry in counts["left_out"]]
    if len(bad) > skips:
        more = f" (and {len(bad) - 1} more so far; --skip allows {skips})" if len(bad) > 1 else "; --skip=N leaves out N bad rows"
        raise UserError(f"{_line(bad[0])}{more}")


def _finish(job: Job, final: Path, counts: Sequence[dict], components: int) -> dict:
    """Turn the shards into a folder of TensorFlow Datasets, and move it to its final path.

    Args:
      counts: those of each shard.
      components: the number of sets of rows that share a query or a positive, directly or through other rows.
    """
    source, directory = job.source, job.directory
    left_out = [entry for shard in counts for entry in shard["left_out"]]
    _print_left_out(left_out)
    if pages := sum(shard["unread_pages"] for shard in counts):
        print(f"{source.name}: {pages:,} pages of TIFFs were not read; of each TIFF, the first page is", flush=True)
    rows = {split: [shard["rows"][split] for shard in counts] for split in records.SPLITS}
    if not any(rows["train"]):
        raise UserError(f"{source.rows.files[0]}: no rows are left for training")
    _join(job)
    template = naming.ShardedFileTemplate(data_dir=directory, dataset_name=DATASET, filetype_suffix="array_record")  # pyright: ignore[reportArgumentType] (any path)
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=records.features(),
        split_infos=[tfds.core.SplitInfo(split, lengths, 0) for split, lengths in rows.items()],
        filename_template=template,
        check_data=False,
    )
    images = directory / IMAGES
    marker = {
        "version": VERSION,
        "fingerprint": digest("".join(shard["digest"] for shard in counts).encode()),
        "inputs": job.inputs,
        "files": _names(source),
        "images": sum(shard["images"] for shard in counts) + (len(json.loads(images.read_text())) if images.is_file() else 0),
        "components": components,
        "rows": {split: sum(lengths) for split, lengths in rows.items()},
        "held_out": {
            split: {side: _distinct(counts, split, side) for side in ("queries", "documents")} for split in records.HELD_OUT_SPLITS
        },
        **{side: {name: sum(shard[side][name] for shard in counts) for name, _ in TYPES} for side in ("queries", "positives")},
        **{name: sum(shard[name] for shard in counts) for name in ("negatives", *NUMBERS)},
        "bytes": sum(shard["bytes"] for shard in counts),
        "left_out": left_out,
        **source.facts,
    }
    remove_copy(directory)
    files.remove_folder(final)
    os.replace(directory, final)
    records.write_marker(final.parent, marker)
    return marker


def _distinct(counts: Sequence[dict], split: str, side: str) -> int:
    return len(set().union(*(shard["held_out"][split][side] for shard in counts)))


def _join(job: Job) -> None:
    """Write one file of descriptions for each split, and give the records of all shards the names of TensorFlow Datasets."""
    directory, expected = job.directory, set()
    for split in records.SPLITS:
        with replacing(descriptions.file_of(directory, split)) as target:
            for shard in range(job.shards):
                target.write(shards.descriptions_file(directory, split, shard).read_bytes())
        for shard in range(job.shards):
            name = f"{DATASET}-{split}.array_record-{shard:05}-of-{job.shards:05}"
            if stored := shards.stored_file(directory, split, shard):
                os.replace(stored, directory / name)
            expected.add(name)
    for file in directory.glob(f"{DATASET}-*"):  # of a preparation of another number of rows
        if file.name not in expected:
            file.unlink()
    for file in (directory / shards.FOLDER).iterdir():
        if int(file.name.partition(".")[0]) >= job.shards or file.suffix == ".tmp":
            file.unlink()
