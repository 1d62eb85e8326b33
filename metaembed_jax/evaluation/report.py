"""What people see of a sweep: a table in the terminal, results.json, and a picture of quality against cost."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.metrics import METRICS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito: told apart by colour-blind readers


def format_table(results: dict) -> str:
    """The results of `sweep` as aligned text, metrics in percent, the gain with its 95 % bootstrap interval below."""
    return "\n\n".join(_format_direction(direction) for direction in results["directions"])


def _format_direction(direction: dict) -> str:
    lines = [("budget", "FLOPs", "bytes", *METRICS)]
    for row in direction["rows"]:
        quality = (f"{100 * row['metrics'][metric]['mean']:.1f}" for metric in METRICS)
        lines.append((_name(row["budget"]), f"{row['flops_per_candidate']:,}", f"{row['bytes_per_candidate']:,}", *quality))
    if gain := direction["gain"]:
        metrics = [{key: f"{100 * value:+.1f}" for key, value in gain["metrics"][metric].items()} for metric in METRICS]
        lines.append(("gain", "", "", *(m["mean"] for m in metrics)))
        lines.append(("95 % interval", "", "", *(f"{m['low']} to {m['high']}" for m in metrics)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = (
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
    sizes = f"{direction['queries']:,} queries, {direction['candidates']:,} candidates"
    head = f"{direction['name']}: {sizes}, FLOPs and bytes per candidate"
    return "\n".join([head, *table])


def _name(budget: Sequence[int]) -> str:
    return f"{budget[0]}:{budget[1]}"


def write_results(path: str | os.PathLike, results: dict, config: dict, data_fingerprint: str, versions: dict[str, str]) -> None:
    """Writes the results of `sweep` and what they came from as JSON with sorted keys; an older file is replaced whole or kept.

    Raises UserError when a number is NaN or infinite, and when the file cannot be written.
    """
    record = results | {"config": config, "data_fingerprint": data_fingerprint, "versions": versions}
    try:
        text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f"{path} not written: the results hold NaN or an infinity; look for it in the metrics and the config"
        ) from error
    write_file(Path(path), (text + "\n").encode())


def read_results(path: str | os.PathLike) -> dict:
    """What `write_results` wrote. Raises UserError when the file is missing or is something else; names it."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); train.py and eval.py write such files") from error
    if not isinstance(results, dict) or not {"directions", "config"} <= results.keys():
        raise UserError(f"{path} is no results.json of train.py or eval.py")
    return results


def write_file(path: Path, content: bytes) -> None:
    """Writes beside the path, then renames: a reader or a crash never meets half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another place") from error
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the write's own error is the one to tell
        pass


def plot(path: str | os.PathLike, labelled: Sequence[tuple[str, dict]]) -> None:
    """A PNG of quality against cost: R@10 and R@1 over FLOPs and over bytes per candidate, a line for each label.

    labelled: (label, results of `sweep`) pairs. The directions are rows of panels: backward, the same budget costs other
    bytes. Bars are 95 % bootstrap intervals; the numbers at the points are the budgets. Raises UserError as `write_results`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # Figure objects only: pyplot keeps global state
    from matplotlib.figure import Figure

    count = max(len(results["directions"]) for _, results in labelled)
    figure = Figure(figsize=(11, 0.9 + 3.7 * count), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(count, 2, squeeze=False, sharey="row", sharex="col")
    for number, row in enumerate(panels):
        shown = [(label, results["directions"][number]) for label, results in labelled if number < len(results["directions"])]
        for panel, cost, unit in zip(row, ("flops_per_candidate", "bytes_per_candidate"), ("", "B"), strict=True):
            _draw_panel(panel, shown, cost)
            _style_panel(panel, unit)
        row[0].set_title(" · ".join(dict.fromkeys(direction["name"] for _, direction in shown)), loc="left", fontweight="bold")
        row[0].set_ylabel("queries answered (%)")
    panels[-1][0].set_xlabel("MaxSim FLOPs per candidate")
    panels[-1][1].set_xlabel("index bytes per candidate (bf16)")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_file(Path(path), content.getvalue())


def _draw_panel(panel, shown: Sequence[tuple[str, dict]], cost: str) -> None:
    """The lines of one direction over one cost; a budget is written once, over the highest line that reaches it."""
    highest = {}
    for number, (label, direction) in enumerate(shown):
        for metric, style, face in (("R@10", "-", None), ("R@1", "--", "white")):
            points = [
                (row[cost], *(100 * row["metrics"][metric][key] for key in ("mean", "low", "high"))) for row in direction["rows"]
            ]
            points_by_cost = sorted(zip(points, direction["rows"], strict=True), key=lambda pair: pair[0][0])
            x, mean, low, high = zip(*(point for point, _ in points_by_cost), strict=True)
            colour = COLOURS[number % len(COLOURS)]
            bars = np.maximum([np.subtract(mean, low), np.subtract(high, mean)], 0)  # rounding must not make a bar negative
            panel.errorbar(
                x,
                mean,
                yerr=bars,
                color=colour,
                linestyle=style,
                linewidth=1.8,
                marker="o",
                markersize=6,
                markerfacecolor=face or colour,
                capsize=3,
                elinewidth=1,
                label=f"{label} {metric}".strip(),
            )
            for point, row in points_by_cost:
                spot = (point[0], _name(row["budget"]))
                highest[spot] = max(highest.get(spot, 0), point[3])
    for (x, budget), top in highest.items():
        panel.annotate(budget, (x, top), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8, color="#444444")


def _style_panel(panel, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(base=4))  # budgets grow by powers of two, about a factor of four a step
    panel.xaxis.set_major_formatter(EngFormatter(unit=unit, places=0, sep=" " if unit else ""))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.margins(x=0.08, y=0.12)
    low, high = panel.dataLim.intervalx
    if low == high:  # one budget
        panel.set_xlim(low / 2, high * 2)
    panel.set_ylim(bottom=0)
    panel.grid(color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
