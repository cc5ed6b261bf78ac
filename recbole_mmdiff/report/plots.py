"""Pictures of results: bars, training curves, and sensitivity to a key."""

import math
from pathlib import Path

import numpy as np

from recbole_mmdiff.report.figures import (
    colours,
    legend,
    line_styles,
    new_figure,
    plain_log_axis,
    save,
    shorten,
    styled,
    use_log,
    wrapped,
)
from recbole_mmdiff.report.results import Results
from recbole_mmdiff.report.statistics import row_means, summarize
from recbole_mmdiff.report.tables import missing_text, with_arrow

PANELS_IN_A_ROW = 5
#: place in an entry of the history -> what stands there
_CURVES = {2: "training loss", 3: "validation score"}


@styled
def bar_plot(results: Results, table: str, metric: str, path: Path, pdf: bool = False) -> list[Path]:
    """Mean and standard deviation of a metric: settings along x, one bar for each model.

    Args:
        path: of the picture, without suffix.

    Returns:
        The written files; none if no run has a value.
    """
    models, settings = results.models(table), results.settings(table)
    rows = [row_means(results, table, setting, metric) for setting in settings]
    if not any(summary.n for row in rows for summary in row.values()):
        return []
    bars = len(models) * len(settings)
    inches = min(max(4, 1 + 0.24 * bars), 22)
    figure = new_figure(inches + 2.5, 4)
    axes, handles = figure.add_subplot(), []
    axes.grid(visible=False, axis="x")
    width, (low, high) = 0.84 / len(models), _bar_range(rows)
    for number, (model, colour) in enumerate(zip(models, colours(len(models)), strict=True)):
        x = np.arange(len(settings)) + (number - (len(models) - 1) / 2) * width
        there = [at for at, row in enumerate(rows) if row[model].n]
        handles.append(axes.bar(
            x[there], [rows[at][model].mean for at in there], 0.9 * width, color=colour,
            yerr=[rows[at][model].sd for at in there], ecolor="#333333", capsize=2,
            error_kw={"linewidth": 1}))
        for at in set(range(len(settings))) - set(there):
            axes.text(x[at], low + 0.02 * (high - low), missing_text(results, model, settings[at], table),
                      rotation=90, ha="center", va="bottom", fontsize=8, color="#555555")
    axes.set_ylim(low, high)
    axes.set_xticks(range(len(settings)), [
        wrapped(setting, max(int(10 * inches / len(settings)), 8)) for setting in settings])
    axes.set_xlim(-0.5, len(settings) - 0.5)
    axes.set_ylabel(with_arrow(metric) + ("\n(axis does not begin at 0)" if low > 0 else ""))
    legend(figure, handles, models)
    return save(figure, path, pdf)


def _bar_range(rows) -> tuple[float, float]:
    """The y axis; it leaves zero only where every bar would look the same."""
    ends = [(summary.mean - np.nan_to_num(summary.sd), summary.mean + np.nan_to_num(summary.sd))
            for row in rows for summary in row.values() if summary.n]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    room = 0.08 * (high - low) or 0.08 * abs(high) or 1
    if low > 0.5 * high > 0 and high > low:
        # A difference of a few thousandths shall not look like one of a half.
        return max(min(low - 4 * room, 0.95 * high), 0), high + room
    return min(low - room, 0) if low < 0 else 0, max(high + room, 0)


@styled
def loss_curves(results: Results, table: str, path: Path, pdf: bool = False) -> list[Path]:
    """Training loss and validation score by epoch, a line for each model and a panel for each stage.

    The first setting and seed with a finished run that kept its history is shown.

    Args:
        path: of the picture, without suffix.

    Returns:
        The written files; none if no run kept a history.
    """
    setting, seed, histories = _first_histories(results, table)
    stages = list(dict.fromkeys(entry[0] for history in histories.values() for entry in history))
    shown = [column for column in _CURVES if any(
        math.isfinite(entry[column]) for history in histories.values() for entry in history)]
    if not shown:
        return []
    styles, lines = line_styles(results.models(table)), {}
    bands, columns = _rows_and_columns(len(stages))
    figure = new_figure(2.2 + 3.3 * columns, 0.4 + 2.6 * bands * len(shown))
    for number, stage in enumerate(stages):
        band, place = divmod(number, columns)
        for below, column in enumerate(shown):
            curves = {model: [(entry[1], entry[column]) for entry in history if entry[0] == stage]
                      for model, history in histories.items()}
            if any(math.isfinite(value) for curve in curves.values() for _, value in curve):
                axes = figure.add_subplot(bands * len(shown), columns,
                                          (band * len(shown) + below) * columns + place + 1)
                axes.set(title=shorten(stage, 34), xlabel="epoch", ylabel=_CURVES[column])
                lines |= _draw_curves(axes, curves, styles)
    figure.suptitle(shorten(f"{setting}, seed {seed}", 80), fontsize=10)
    order = [model for model in styles if model in lines]
    legend(figure, [lines[model] for model in order], order)
    return save(figure, path, pdf)


def _draw_curves(axes, curves: dict[str, list[tuple[int, float]]], styles: dict[str, dict]) -> dict:
    """Model -> its line, for the models that have a value."""
    lines = {}
    for model, points in curves.items():
        if any(math.isfinite(value) for _, value in points):
            # Markers sit at other epochs for each line, so that lines upon each other are seen.
            step = max(len(points) // 6, 1)
            begin = list(styles).index(model) % step
            lines[model], = axes.plot(*zip(*points, strict=True), **styles[model], markevery=(begin, step))
    if use_log([value for points in curves.values() for _, value in points]):
        plain_log_axis(axes.yaxis)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return lines


def _first_histories(results: Results, table: str) -> tuple[str, int, dict[str, list]]:
    """The first setting and seed of which some model kept a history, and those by model."""
    for setting in results.settings(table):
        for seed in results.plan.seeds:
            histories = {cell.model: results.history(cell) for model in results.models(table)
                         for cell in results.cells(model, setting, table) if cell.seed == seed}
            histories = {model: history for model, history in histories.items() if history}
            if histories:
                return setting, seed, histories
    return "", 0, {}


def _rows_and_columns(count: int) -> tuple[int, int]:
    """An even grid for so many panels."""
    rows = -(-count // PANELS_IN_A_ROW)
    return rows, -(-count // rows)


def _panel_grid(count: int):
    """Axes for so many panels, and their figure."""
    rows, columns = _rows_and_columns(count)
    figure = new_figure(2.2 + 3.3 * columns, 0.4 + 2.8 * rows)
    return [figure.add_subplot(rows, columns, number + 1) for number in range(count)], figure


def sweeps(results: Results) -> list[tuple[str, str, str]]:
    """(model, key, table) of every swept key, in the order of the plan."""
    return list(dict.fromkeys((cell.sweep.model, cell.sweep.key, cell.table)
                              for cell in results.plan.cells if cell.sweep))


def sweep_summaries(results: Results, model: str, key: str, table: str, metric: str) -> dict:
    """Setting -> [(value of the key, ``Summary`` over the seeds)], values in ascending order.

    Values that are no numbers keep the order of the plan.
    """
    found: dict[str, dict] = {}
    for cell in results.plan.cells:
        if cell.sweep and (cell.sweep.model, cell.sweep.key, cell.table) == (model, key, table):
            by_value = found.setdefault(cell.setting, {})
            by_value.setdefault(cell.sweep.value, []).append(results.value(cell, metric))
    curves = {setting: [(value, summarize(values)) for value, values in by_value.items()]
              for setting, by_value in found.items()}
    if _numeric([value for curve in curves.values() for value, _ in curve]):
        curves = {setting: sorted(curve, key=lambda point: point[0]) for setting, curve in curves.items()}
    return curves


def _numeric(values: list) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool)
               and math.isfinite(value) for value in values)


@styled
def sensitivity_plot(results: Results, model: str, key: str, table: str, path: Path,
                     pdf: bool = False) -> list[Path]:
    """A panel for each metric: its mean over the swept values of a key, the deviation as a band.

    Args:
        path: of the picture, without suffix.

    Returns:
        The written files; none if no run has a value.
    """
    metrics = results.plan.tables[table]
    curves = {metric: sweep_summaries(results, model, key, table, metric) for metric in metrics}
    metrics = [metric for metric in metrics
               if any(point.n for curve in curves[metric].values() for _, point in curve)]
    if not metrics:
        return []
    values = list(dict.fromkeys(value for curve in curves[metrics[0]].values() for value, _ in curve))
    numeric, lines = _numeric(values), {}
    settings = [setting for setting in results.plan.settings if setting in curves[metrics[0]]]
    styles = line_styles(settings)
    axes, figure = _panel_grid(len(metrics))
    for place, metric in zip(axes, metrics, strict=True):
        for setting in settings:
            points = [(value if numeric else values.index(value), point)
                      for value, point in curves[metric][setting] if point.n]
            x, mean = (np.array([part(*pair) for pair in points]) for part in
                       (lambda value, _: value, lambda _, point: point.mean))
            sd = np.nan_to_num([point.sd for _, point in points])
            lines[setting], = place.plot(x, mean, **styles[setting])
            place.fill_between(x, mean - sd, mean + sd, color=styles[setting]["color"], alpha=0.2, lw=0)
        if not numeric:
            place.set_xticks(range(len(values)), [shorten(str(value), 12) for value in values])
        elif use_log(values):
            plain_log_axis(place.xaxis)
        place.set_xlabel(shorten(key, 40))
        place.set_ylabel(with_arrow(metric))
    figure.suptitle(shorten(model, 60), fontsize=10)
    legend(figure, list(lines.values()), list(lines))
    return save(figure, path, pdf)
