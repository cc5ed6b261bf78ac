"""The report of a results store: every table, test and picture, and a page that joins them."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from recbole_mmdiff.errors import one_of
from recbole_mmdiff.files import write_atomically
from recbole_mmdiff.report.critical_difference import block_values, critical_difference_plot, too_few
from recbole_mmdiff.report.embeddings import EMBEDDINGS, embedding_plot
from recbole_mmdiff.report.figures import require_matplotlib
from recbole_mmdiff.report.formats import (
    latex,
    markdown,
    markdown_text,
    one_line,
    results_csv,
    slug,
    statistics_csv,
    tuned_csv,
)
from recbole_mmdiff.report.plots import bar_plot, loss_curves, sensitivity_plot, sweeps
from recbole_mmdiff.report.published import published_markdown
from recbole_mmdiff.report.results import DONE, FAILED, PENDING, Results
from recbole_mmdiff.report.statistics import all_tests
from recbole_mmdiff.report.tables import ROWS, build_table, checked_ours

logger = logging.getLogger(__name__)


def format_table(results: Results, table: str, ours: Sequence[str] | None = None,
                 rows: str = "settings") -> str:
    """One table of the plan as Markdown, with its notes.

    Args:
        ours: the models that are compared with the best of the others; by default what the plan
            says, or else the best model of each row.
        rows: ``settings`` (a row for each setting and metric) or ``models`` (a row for each model).

    Raises:
        ConfigError: an unknown table, layout or model.
        DataError: values by user that cannot be read.
    """
    return markdown(build_table(results, table, checked_ours(results, ours), rows))


def write_report(store: str | os.PathLike, output: str | os.PathLike | None = None,
                 ours: Sequence[str] | None = None, rows: str = "settings", plots: bool = True,
                 pdf: bool = False) -> list[Path]:
    """Write the report of a results store; the same store gives the same text files.

    ``report.md`` joins everything; ``table_<name>.md`` and ``.tex`` are the tables, ``results.csv``
    and ``statistics.csv`` all numbers and tests, ``published.md`` the comparison with the paper.

    Args:
        store: the folder that ``recbole-mmdiff compare`` wrote; cells may still be missing.
        output: the folder of the report, ``<store>/report`` by default.
        ours, rows: as in ``format_table``.
        plots: also draw pictures; needs matplotlib.
        pdf: write each picture as PDF too.

    Returns:
        The written files.

    Raises:
        ConfigError: an unknown layout or model, or matplotlib is missing.
        DataError: a file of the store that cannot be read; names it.
    """
    one_of("rows", rows, ROWS)
    if plots:
        require_matplotlib()
    results = Results.load(store)
    ours = checked_ours(results, ours)
    folder = Path(output) if output is not None else results.store / "report"
    tests = all_tests(results, ours)
    texts, tables = {"results.csv": results_csv(results), "statistics.csv": statistics_csv(tests)}, []
    if any(cell.trials for cell in results.plan.cells):
        texts["tuned.csv"] = tuned_csv(results)
    for table, name in _names(results.plan.tables).items():
        grid = build_table(results, table, ours, rows, tests)
        texts[f"table_{name}.md"] = markdown(grid)
        texts[f"table_{name}.tex"] = latex(grid, f"{results.plan.name}: {table}")
        tables.append((table, texts[f"table_{name}.md"]))
    if results.plan.published:
        texts["published.md"] = published_markdown(results)
    folder.mkdir(parents=True, exist_ok=True)
    pictures, skipped = _draw_all(results, folder, pdf) if plots else ([], [])
    texts["report.md"] = _page(results, tables, pictures, skipped)
    for name, text in texts.items():
        with write_atomically(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    return [*(folder / name for name in texts), *pictures]


def _names(labels: Iterable) -> dict:
    """Label (or tuple of labels) -> a file name of its own."""
    found, taken = {}, set()
    for label in labels:
        name = base = slug(label if isinstance(label, str) else "_".join(label))
        number = 2
        # Some file systems do not tell upper from lower case.
        while name.lower() in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name.lower())
        found[label] = name
    return found


def _draw_all(results: Results, folder: Path, pdf: bool) -> tuple[list[Path], list[str]]:
    """Every picture that the results allow; and a line for each that they do not."""
    pictures, skipped = [], []

    def draw(plot: Callable, *args, why: str) -> None:
        found = plot(*args, pdf)
        pictures.extend(found)
        if not found:
            skipped.append(why)
            logger.info("no picture: %s", why)

    for (table, metric), name in _names(_metrics(results)).items():
        draw(bar_plot, results, table, metric, folder / f"bars_{name}",
             why=f"bars of {metric} ({table}): no run has a value")
        draw(critical_difference_plot, results, table, metric, folder / f"ranks_{name}",
             why=f"critical differences of {metric} ({table}): "
                 f"{too_few(*block_values(results, table, metric))}")
    shown = set()
    for table, name in _names(results.plan.tables).items():
        # Two tables may be two views of the same runs.
        runs = frozenset(cell.folder for cell in results.plan.cells if cell.table == table)
        if runs in shown:
            continue
        shown.add(runs)
        draw(loss_curves, results, table, folder / f"losses_{name}",
             why=f"training curves ({table}): no run kept its history")
    for sweep, name in _names(sweeps(results)).items():
        draw(sensitivity_plot, results, *sweep, folder / f"sensitivity_{name}",
             why=f"sensitivity of {sweep[0]} to {sweep[1]} ({sweep[2]}): no run has a value")
    if (results.store / EMBEDDINGS).is_file():
        draw(embedding_plot, results.store / EMBEDDINGS, folder / "embeddings", why="")
    return pictures, skipped


def _metrics(results: Results) -> list[tuple[str, str]]:
    return [(table, metric) for table, metrics in results.plan.tables.items() for metric in metrics]


def _page(results: Results, tables: list[tuple[str, str]], pictures: list[Path],
          skipped: list[str]) -> str:
    """``report.md``: how far the comparison is, its tables, failures and pictures."""
    # One run may stand in several tables.
    runs = {cell.folder: cell for cell in results.plan.cells}.values()
    states = [results.state(run) for run in runs]
    parts = [f"# {markdown_text(results.plan.name)}\n",
             f"{len(runs)} runs: " + ", ".join(f"{states.count(state)} {state}"
                                                 for state in (DONE, FAILED, PENDING)) + ".\n"]
    for table, text in tables:
        parts.append(f"## {markdown_text(table)}\n\n{text}")
    if results.plan.published:
        parts.append("Beside the published numbers: [published.md](published.md).\n")
    failed = [run for run in runs if results.state(run) == FAILED]
    if failed:
        parts.append("## Failed runs\n")
        parts.append("".join(
            f"- {markdown_text(f'{run.model}, {run.setting}, {run.table}, seed {run.seed}')} "
            f"(`{run.folder}`): {markdown_text(results.errors[run.folder][:500])}\n" for run in failed))
    if pictures or skipped:
        parts.append("## Pictures\n")
        parts.extend(f"![{one_line(path.stem)}]({path.name})\n" for path in pictures
                     if path.suffix == ".png")
        parts.append("".join(f"- Left out: {markdown_text(why)}.\n" for why in skipped))
    return "\n".join(parts)
