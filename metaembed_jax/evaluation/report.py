"""What people see of a sweep: a table in the terminal, results.json, and a picture of quality against cost."""

import os
from collections.abc import Sequence

from metaembed_jax import files
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.budgets import budget_name
from metaembed_jax.evaluation.drawing import Curve, Point, Row, draw
from metaembed_jax.evaluation.metrics import METRICS
from metaembed_jax.evaluation.tables import Table, as_text


def format_table(results: dict) -> str:
    """The tables of `tables` as text."""
    return "\n\n".join(map(as_text, tables(results)))


def tables(results: dict) -> list[Table]:
    """The results of `sweep`: of each direction, metrics in percent, the gain with its 95 % bootstrap interval below."""
    return [_table(direction) for direction in results["directions"]]


def _table(direction: dict) -> Table:
    lines = []
    for row in direction["rows"]:
        quality = (f"{100 * row['metrics'][metric]['mean']:.1f}" for metric in METRICS)
        lines.append((budget_name(row["budget"]), f"{row['flops_per_candidate']:,}", f"{row['bytes_per_candidate']:,}", *quality))
    if gain := direction["gain"]:
        metrics = [{key: f"{100 * value:+.1f}" for key, value in gain["metrics"][metric].items()} for metric in METRICS]
        lines.append(("gain", "", "", *(m["mean"] for m in metrics)))
        lines.append(("95 % interval", "", "", *(f"{m['low']} to {m['high']}" for m in metrics)))
    sizes = f"{direction['queries']:,} queries, {direction['candidates']:,} candidates"
    return Table(
        f"{direction['name']}: {sizes}, FLOPs and bytes per candidate",
        "In percent, over all queries: R@k, those with a right candidate among the first k; nDCG@10, the mean of it. "
        "A budget is query vectors : candidate vectors; the gain is the last one's over the first one's.",
        ("budget", "FLOPs", "bytes", *METRICS),
        [lines],
    )


def write_results(path: str | os.PathLike, results: dict, config: dict, data_fingerprint: str, versions: dict[str, str]) -> None:
    """Writes the results of `sweep` and what they came from as JSON with sorted keys; an older file is replaced whole or kept.

    Raises UserError when a number is NaN or infinite, and when the file cannot be written.
    """
    record = results | {"config": config, "data_fingerprint": data_fingerprint, "versions": versions}
    try:
        content = files.to_json(record, sort_keys=True)
    except ValueError as error:
        raise UserError(
            f"{path} not written: the results hold NaN or an infinity; look for it in the metrics and the config"
        ) from error
    files.write_bytes(files.any_path(path), content)


def read_results(path: str | os.PathLike) -> dict:
    """What `write_results` wrote. Raises UserError when the file is missing or is something else; names it."""
    try:
        results = files.read_json(files.any_path(path))
    except UserError as error:
        raise UserError(f"{error}; train.py and eval.py write such files") from error
    config, directions = results.get("config"), results.get("directions")
    named = isinstance(config, dict) and isinstance(config.get("name"), str)
    if not named or not isinstance(directions, list) or not all(isinstance(direction, dict) for direction in directions):
        raise UserError(f"{path} is no results.json of train.py or eval.py")
    return results


def picture(labelled: Sequence[tuple[str, dict]]) -> bytes:
    """A PNG of quality against cost: R@10 and R@1 over FLOPs and over bytes per candidate, a colour for each label.

    labelled: (label, results of `sweep`) pairs. The directions are rows of panels: backward, the same budget costs other
    bytes. Bars are 95 % bootstrap intervals; the numbers at the points are the budgets.
    """
    rows = []
    for number in range(max(len(results["directions"]) for _, results in labelled)):
        shown = [(label, results["directions"][number]) for label, results in labelled if number < len(results["directions"])]
        title = " · ".join(dict.fromkeys(direction["name"] for _, direction in shown))
        curves = [
            Curve(f"{label} {metric}".strip(), _points(direction, metric), colour, secondary=metric == "R@1")
            for colour, (label, direction) in enumerate(shown)
            for metric in ("R@10", "R@1")
        ]
        rows.append(Row(title, "queries answered (%)", curves))
    return draw(rows)


def _points(direction: dict, metric: str) -> list[Point]:
    return [
        Point(budget_name(row["budget"]), row["flops_per_candidate"], row["bytes_per_candidate"], **row["metrics"][metric])
        for row in direction["rows"]
    ]
