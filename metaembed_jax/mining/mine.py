"""Mine the hard negatives of a source: index its training documents, search them with its queries, and write a source.

    OUT/mining/{fingerprint}.npz       digests of all items of the source
    OUT/mining/index/                  its documents, encoded
    OUT/mining/{key}/00000.npz         the negatives of a block of queries; written when the block is searched
    OUT/mining/{key}/negatives.npy     those of all pairs
    OUT/{version}/                     the source, as `preparation` writes it

A job that was killed continues from what is written, and ends with the same source. No table of all scores is ever in memory. The
folder `mining` is removed when the source is complete.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from metaembed_jax import hosts
from metaembed_jax.checkpoints.loading import best_step
from metaembed_jax.data import sources
from metaembed_jax.data.sources import preparation, records
from metaembed_jax.data.sources.shards import RawSource
from metaembed_jax.data.workers import workers_for
from metaembed_jax.devices import describe_devices
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, locked, remove_folder, replacing
from metaembed_jax.late_interaction.budgets import search_name
from metaembed_jax.late_interaction.stages import Stages, as_stages, largest_budget
from metaembed_jax.mining.blocks import BlockMiner, MinedBlock
from metaembed_jax.mining.items import SourceDocuments, find_items
from metaembed_jax.mining.mined_rows import MinedRows, as_record, no_images
from metaembed_jax.mining.selection import COUNTS, Selection
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.build import index_documents
from metaembed_jax.retrieval.index_and_search import load_model, parse_search

VERSION = 1  # of the rules by which negatives are mined
FOLDER, LOCK = "mining", "mining.lock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mining:
    """A source to mine, and the one to write.

    Attributes:
      source, out: their names.
      data_dir: the folder of both.
      selection: chooses the negatives.
      stages: of a search.
      model: path or hub id of the model, for the marker.
      step: of its checkpoint; None if it is not a run.
    """

    source: str
    out: str
    data_dir: Path
    selection: Selection
    stages: Stages
    model: str
    step: int | None

    @property
    def folder(self) -> Path:
        """The folder of the source that is written."""
        return self.data_dir / self.out

    def origin(self, encoder: MetaEmbed) -> dict:
        """Return the settings and fingerprints that the negatives depend on."""
        selection = dataclasses.asdict(self.selection) | {"range_max": self.selection.last}
        return {
            "rules": VERSION,
            "source": self.source,
            "source_fingerprint": sources.prepare(self.source, self.data_dir)["fingerprint"],
            "model_fingerprint": encoder.fingerprint,
            "processor": encoder.processor.fingerprint,
            "search": search_name(self.stages),
            **selection,
        }


def mine_source(
    model: str,
    source: str,
    out: str,
    data_dir: Path,
    selection: Selection,
    budget: str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> None:
    """Mine a source by the flags of `metaembed mine`.

    Args:
      model: path or hub id.
      budget: of the search, such as 16:64, or stages; all vectors by default.
      mesh: as for `load_model`.

    Raises:
      UserError: as `load_model`, `parse_search` and `mine`.
    """
    check_names(source, out, data_dir)
    hosts.first_then_others(lambda: sources.prepare(source, data_dir))  # before the model is loaded
    encoder = load_model(model, mesh)
    if encoder.config.reads_states:
        raise UserError(f"--model={model} reads all states; expected a model with Meta Tokens")
    if hosts.is_first():
        print(describe_devices(encoder.mesh, encoder.weight_bytes), flush=True)
    largest = encoder.largest_budget
    stages = as_stages(largest[:2], largest) if budget is None else parse_search(budget, largest)
    names = {"source": source, "out": out, "data_dir": data_dir, "model": model, "step": best_step(model)}
    mine(Mining(selection=selection, stages=stages, **names), encoder)


def check_names(source: str, out: str, data_dir: Path) -> None:
    """Check that the mined source has a name of its own.

    Raises:
      UserError: the name is that of another source, or is not the name of a folder.
    """
    if out != Path(out).name or out.startswith("."):
        raise UserError(f"--out={out}: expected a name, such as {source}-mined; the source is written to {data_dir}/NAME")
    if out == source or out in sources.GENERATED:
        raise UserError(f"--out={out}: is the name of another source; expected a new one, such as {source}-mined")
    marker = records.read_marker(data_dir / out, preparation.VERSION)
    if marker and "mined" not in marker:
        raise UserError(f"{data_dir / out} is a prepared source that was not mined; choose another --out or remove it")


def mine(mining: Mining, encoder: MetaEmbed) -> None:
    """Write a source with mined negatives, unless it is complete already, and print its counts. All hosts call this.

    Raises:
      UserError: a name or the window of ranks is wrong, no document passes the selection, or another process mines it.
    """
    survivors = min((stage.survivors for stage in mining.stages[:-1]), default=mining.selection.last)
    if survivors < mining.selection.last:
        raise UserError(f"--budget: {survivors} survivors; expected at least --range-max={mining.selection.last}")
    check_names(mining.source, mining.out, mining.data_dir)
    hosts.first_then_others(lambda: sources.prepare(mining.source, mining.data_dir))
    origin = mining.origin(encoder)  # all hosts compute the fingerprint of the model together
    key, marker = digest(json.dumps(origin).encode()), records.read_marker(mining.folder, preparation.VERSION)
    if marker and marker["mined"]["key"] == key:
        if hosts.is_first():
            print(f"{mining.folder} is complete: it was mined with this model and these settings\n{summary(marker)}", flush=True)
        return
    if hosts.is_first():
        mining.folder.mkdir(parents=True, exist_ok=True)
    hosts.wait_for_all("mining")
    busy = f"{mining.folder} is being mined by another process; wait for it to end"
    with locked(mining.folder / LOCK, busy) if hosts.is_first() else contextlib.nullcontext():
        negatives, counts = _mine_negatives(mining, encoder, mining.folder / FOLDER, key)
        if hosts.is_first():
            marker = _write_source(mining, negatives, {**origin, "key": key, "model": mining.model, "step": mining.step} | counts)
            print(summary(marker), flush=True)
            remove_folder(mining.folder / FOLDER)
        hosts.wait_for_all("mined")


def summary(marker: dict) -> str:
    """Return lines about a mined source, from its marker: its inputs, and how many results were left out and why."""
    mined = marker["mined"]
    kept, results = mined["mined"], sum(mined[name] for name in COUNTS)
    step = "" if mined["step"] is None else f", step {mined['step']}"
    lines = [
        f"{mined['pairs']:,} pairs of {mined['source']}, {mined['queries']:,} queries, {mined['documents']:,} documents; "
        f"model {mined['model']}{step} ({mined['model_fingerprint']}), search {mined['search']}",
        f"{results:,} results: {kept:,} mined; left out: {mined['answers']:,} that answer the query, {mined['skipped']:,} above "
        f"rank {mined['range_min'] + 1}, {mined['close']:,} within the margin of the positive or above it, {mined['spare']:,} "
        "not needed",
        f"{mined['fewer']:,} pairs have fewer than {mined['negatives']} mined negatives, {mined['none']:,} of them none",
    ]
    if 2 * mined["none"] > mined["pairs"]:
        lines.append("most pairs have none, as the scores of this model are close: raise --range-max, or lower --relative-margin")
    return "\n".join(f"  {line}" for line in lines)


def _mine_negatives(mining: Mining, encoder: MetaEmbed, work: Path, key: str) -> tuple[Path, dict]:
    """Return the file of the negatives of all pairs, and the counts. All hosts search; the first writes."""
    source = sources.fixed_training(mining.source, mining.data_dir)
    blocks, fingerprint = work / key, sources.prepare(mining.source, mining.data_dir)["fingerprint"]
    if hosts.is_first():
        blocks.mkdir(parents=True, exist_ok=True)
        for other in work.iterdir():  # of other settings
            if other.is_dir() and other.name not in (key, "index"):
                shutil.rmtree(other)
    items = hosts.first_then_others(lambda: find_items(source, work / f"{fingerprint}.npz", mining.source))
    documents = SourceDocuments(source, items.documents, items.stamps)
    budget = largest_budget([mining.stages])[1]
    index_documents(encoder, documents, work / "index", name=mining.model, budget=budget, progress=True)
    miner = BlockMiner(encoder, source, items, work / "index", mining.selection, mining.stages)
    files = [blocks / f"{block:05}.npz" for block in range(len(miner))]
    is_done = json.loads(hosts.from_first(json.dumps([file.is_file() for file in files])))
    with tqdm(total=len(files), initial=sum(is_done), desc="mining", unit="block", disable=not hosts.is_first()) as bar:
        for block in np.flatnonzero(~np.array(is_done)).tolist():
            mined = miner.mine(block)
            if hosts.is_first():
                mined.write(files[block])
            bar.update()
    counts = {"pairs": len(source), "queries": len(items.queries), "documents": len(items.documents)}
    return (_join(blocks, files, len(source), counts), counts) if hosts.is_first() else (blocks, counts)


def _join(folder: Path, files: list[Path], pairs: int, counts: dict) -> Path:
    """Write the negatives of all blocks to one file, and add the sums of their counts to `counts`.

    Raises:
      UserError: no pair has a negative.
    """
    places, total = None, np.zeros(len(COUNTS) + 2, np.int64)
    for block in map(MinedBlock.read, files):
        places = np.full((pairs, *block.places.shape[1:]), -1, np.int32) if places is None else places
        places[block.rows] = block.places
        total += block.counts
    counts |= dict(zip((*COUNTS, "fewer", "none"), total.tolist(), strict=True))
    if places is None or not counts["mined"]:
        raise UserError(
            f"no document passes: of the results of {pairs:,} pairs, {counts['answers']:,} answer the query, and "
            f"{counts['close']:,} are within the margin of the positive or above it; lower --relative-margin or --margin, or raise "
            "--range-max"
        )
    with replacing(folder / "negatives.npy") as target:
        np.save(target, places)
    return folder / "negatives.npy"


def _write_source(mining: Mining, negatives: Path, mined: dict) -> dict:
    """Write the mined source, and return its marker."""
    training = sources.fixed_training(mining.source, mining.data_dir)
    held_out = {split: sources.stored_split(mining.source, mining.data_dir, split) for split in records.HELD_OUT_SPLITS}
    rows = MinedRows(mining.source, training, tuple(held_out.values()), negatives)
    splits = [split for split, pairs in held_out.items() for _ in range(len(pairs))]
    if records.read_marker(mining.folder, preparation.VERSION):
        print(f"{mining.folder}: was mined with another model, source or settings, and is replaced", flush=True)
        remove_folder(mining.folder / preparation.VERSION)
    vocabulary = mining.data_dir / mining.source / "tokenizer.json"
    if vocabulary.is_file():
        shutil.copyfile(vocabulary, mining.folder / "tokenizer.json")
    task = sources.generated_task(mining.source, mining.data_dir)
    raw = RawSource(
        mining.out,
        rows,
        as_record,
        no_images,
        held_out={len(training) + number: split for number, split in enumerate(splits)},
        key=mined["key"],
        facts={"mined": mined} | ({"task": task} if task else {}),
    )
    return preparation.prepare_source(raw, mining.data_dir, workers_for(len(rows)), 0)
