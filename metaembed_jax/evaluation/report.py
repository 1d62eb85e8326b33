"""The files of an evaluation: figures as JSON, tables as text, the plot, and an HTML page of all of them."""

import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from metaembed_jax import files
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluator import Evaluator, Subject
from metaembed_jax.evaluation.failures import worst_of
from metaembed_jax.evaluation.html_report import write_html
from metaembed_jax.evaluation.plots import draw_results
from metaembed_jax.evaluation.tables import format_tables, tables
from metaembed_jax.results import Results, to_json

PACKAGES = ("jax", "flax", "optax", "numpy")  # numbers may depend on their versions


class ReportNames(NamedTuple):
    """Names of the files of a report."""

    figures: str
    tables: str
    plot: str
    html: str


TEST_SPLIT = ReportNames("results.json", "results.txt", "quality.png", "report.html")


def benchmark_names(benchmark: str) -> ReportNames:
    """Return the names of a benchmark's report; a folder may hold it and that of the test split."""
    return ReportNames(*(f"{benchmark}.{kind}" for kind in ("json", "txt", "png", "html")))


def write_report(evaluator: Evaluator, subject: Subject, results: Results, out: Path, names: ReportNames) -> list[Path]:
    """Write the files to `out`, and return their paths; must be called by the first host only.

    Raises:
      UserError: a figure is NaN or infinite, or a path cannot be written.
    """
    plot, versions = draw_results([results]), package_versions()
    record = to_json(results) | {"config": subject.config, "versions": versions}
    try:
        figures = files.to_json(record, sort_keys=True)
    except ValueError as error:
        raise UserError(
            f"{out / names.figures} is not written: a result is NaN or infinite; look for it in the metrics and the config"
        ) from error
    files.write_bytes(out / names.figures, figures)
    files.write_bytes(out / names.tables, f"{format_tables(results)}\n".encode(errors="replace"))
    if plot is not None:
        files.write_bytes(out / names.plot, plot)
    facts = {
        "config": results.model,
        "checkpoint": f"step {results.step}",
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "data": results.data,
    }
    failures = evaluator.show(worst_of(failure for task in results.tasks() for failure in task.failures))
    write_html(out / names.html, f"{results.model}: {results.title}", tables(results), plot, failures, facts)
    return [out / name for name in names if plot is not None or name != names.plot]


def package_versions() -> dict[str, str]:
    """Return the installed versions of `PACKAGES`."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}
