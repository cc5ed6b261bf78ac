"""Result tables as grids of text and marks; ``formats`` writes them down."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from recbole_mmdiff.errors import ConfigError, one_of, suggest
from recbole_mmdiff.report.results import FAILED, PENDING, Results, smaller_is_better
from recbole_mmdiff.report.statistics import (
    PairedTest,
    Summary,
    best_model,
    improvement,
    row_means,
    row_tests,
    sides,
)

ROWS = ("settings", "models")
NONE = "n/a"
IMPROVEMENT = "improvement %"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Entry:
    """One cell: ``text``, whether it is the row's ``best`` or ``second``, a star, and a remark."""

    text: str
    mark: str = ""
    star: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Grid:
    """A table without a format.

    Attributes:
        name: the table's name in the plan.
        labels: heads of the label columns.
        columns: heads of the value columns, of one or two levels.
        rows: (labels, entries) of every row.
        notes: the lines below the table.
    """

    name: str
    labels: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    rows: list[tuple[tuple[str, ...], list[Entry]]]
    notes: list[str] = field(default_factory=list)


def decimals_for(values: Sequence[float]) -> int:
    """How many decimals a row of numbers is printed with: 4, or four significant digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=1)
    if largest == 0 or 0.01 <= largest < 10:
        return 4
    return min(max(3 - math.floor(math.log10(largest)), 0), 8)


def missing_text(results: Results, model: str, setting: str, table: str) -> str:
    """What stands where a model has no value: ``failed``, ``pending`` or ``n/a``."""
    states = [results.state(cell) for cell in results.cells(model, setting, table)]
    return next((state for state in (FAILED, PENDING) if state in states), NONE)


def with_arrow(metric: str) -> str:
    """The metric's name, and whether small or large values are good."""
    return f"{metric} {'↓' if smaller_is_better(metric) else '↑'}"


def checked_ours(results: Results, ours: Sequence[str] | None) -> tuple[str, ...] | None:
    """``ours``, or what the plan says; None stands for the best model of each row.

    Raises:
        ConfigError: a label that the plan does not have.
    """
    if ours is None:
        return results.plan.ours
    if isinstance(ours, str):
        ours = [ours]
    for label in ours:
        if label not in results.plan.models:
            raise ConfigError(f"ours: {label!r} is not among the models {list(results.plan.models)}"
                              f"{suggest(label, results.plan.models)}")
    return tuple(ours) or None


def build_table(results: Results, table: str, ours: Sequence[str] | None = None,
                rows: str = "settings", tests: Sequence[PairedTest] | None = None) -> Grid:
    """The grid of one table of the plan.

    Args:
        ours: the models that are compared with the others; None: the best of each row.
        rows: ``settings`` (a row for each setting and metric) or ``models``.
        tests: what ``all_tests`` gave for the same ``ours``, to not make the tests again.

    Raises:
        ConfigError: an unknown table or layout.
    """
    one_of("table", table, results.plan.tables)
    one_of("rows", rows, ROWS)
    models = results.models(table)
    places = [(setting, metric) for setting in results.settings(table)
              for metric in results.plan.tables[table]]
    if tests is None:
        tests = [test for place in places for test in row_tests(results, table, *place, ours)]
    entries = [_row(results, table, *place, ours, tests) for place in places]
    heads = [(setting, with_arrow(metric)) for setting, metric in places]
    if rows == "settings":
        columns = tuple((name,) for name in [*models, IMPROVEMENT])
        grid = Grid(table, ("setting", "metric"), columns, list(zip(heads, entries, strict=True)))
    else:
        names = [(name,) for name in [*models, IMPROVEMENT]]
        turned = [list(column) for column in zip(*entries, strict=True)]
        grid = Grid(table, ("model",), tuple(heads),
                    list(zip(names, turned or [[] for _ in names], strict=True)))
    starred = any(entry.star for row in entries for entry in row)
    grid.notes.extend(_notes(results, table, ours, tests, starred))
    return grid


def _row(results, table, setting, metric, ours, tests) -> list[Entry]:
    """One entry for each model, and the improvement of ours."""
    means = row_means(results, table, setting, metric)
    decimals = decimals_for([summary.mean for summary in means.values()])
    marks, stars = _marks(means, metric, decimals), _stars(means, setting, metric, table, ours, tests)
    entries = []
    for model, summary in means.items():
        planned = len(results.cells(model, setting, table))
        if not summary.n:
            entries.append(Entry(missing_text(results, model, setting, table)))
            continue
        remark = f"{summary.n}/{planned} seeds" if summary.n < planned else ""
        entries.append(Entry(mean_and_sd(summary, decimals), marks.get(model, ""), model in stars, remark))
    return [*entries, _improvement(results, means, table, setting, metric, ours)]


def _improvement(results, means, table, setting, metric, ours) -> Entry:
    """Means over other seeds are means over other users, which the remark says."""
    percent = improvement(means, metric, ours)
    if math.isnan(percent):
        return Entry(NONE)
    seeds = [{seed for seed, value in results.values(model, setting, table, metric).items()
              if not math.isnan(value)}
             for model in (best_model(means, metric, side) for side in sides(means, metric, ours))]
    # Adding 0.0 takes the sign from what rounds to zero.
    return Entry(f"{round(percent, 2) + 0.0:+.2f}", remark="" if seeds[0] == seeds[1] else "unequal seeds")


def mean_and_sd(summary: Summary, decimals: int) -> str:
    """``mean ± sd``, or the mean alone of a single value."""
    if math.isnan(summary.sd):
        return f"{summary.mean:.{decimals}f}"
    return f"{summary.mean:.{decimals}f} ± {summary.sd:.{decimals}f}"


def _marks(means: dict[str, Summary], metric: str, decimals: int) -> dict[str, str]:
    """Model -> ``best`` or ``second``; what prints the same shares the mark, one alone gets none."""
    there = [model for model in means if means[model].n]
    marks = {}
    for mark in ("best", "second") if len(there) > 1 else ():
        first = best_model(means, metric, [model for model in there if model not in marks])
        if first is not None:
            printed = f"{means[first].mean:.{decimals}f}"
            marks |= {model: mark for model in there if model not in marks
                      and f"{means[model].mean:.{decimals}f}" == printed}
    return marks


def _stars(means, setting, metric, table, ours, tests) -> set[str]:
    """Those of ours that are significantly better, over users, than the best other model; in the
    table too, whose error over ratings weighs users otherwise than their mean does."""
    rival = best_model(means, metric, sides(means, metric, ours)[1])
    sign = -1 if smaller_is_better(metric) else 1
    return {test.model for test in tests
            if (test.table, test.setting, test.metric, test.other) == (table, setting, metric, rival)
            and (test.over, test.test) == ("users", "t") and test.holm_p < SIGNIFICANT
            and sign * test.difference > 0
            and sign * (means[test.model].mean - means[rival].mean) > 0}


def _notes(results: Results, table: str, ours, tests, starred: bool) -> list[str]:
    notes = [f"Mean ± sample standard deviation over {len(results.plan.seeds)} seed(s); best in bold, "
             f"second underlined (equal as printed: both); ↑ larger is better, ↓ smaller."]
    who = f"ours ({', '.join(ours)})" if ours else "the best model of the row"
    tested = any(test.table == table and test.over == "users" and not math.isnan(test.p)
                 for test in tests)
    if starred:
        notes.append(f"* {who} is better than the best other model: paired t-test over the values of "
                     f"users (the mean over users, where a table's error is over ratings), p < "
                     f"{SIGNIFICANT} after Holm's correction over the comparisons of the row; all tests "
                     f"are in statistics.csv.")
    elif tested:
        notes.append(f"No star: {who} is nowhere significantly better than the best other model; all "
                     f"tests are in statistics.csv.")
    else:
        notes.append("No tests over users: no two compared models have values by user.")
    notes.append(f"{IMPROVEMENT}: {'the best of ours' if ours else who} over the best other model; "
                 f"positive is better.")
    swept = {cell.model for cell in results.plan.cells if cell.sweep}
    absent = [model for model in results.plan.models if model not in {*results.models(table), *swept}]
    if absent:
        notes.append(f"{NONE} in the whole table: {', '.join(absent)}.")
    return notes + _trials_note(results, table) + _conditions_note(results, table)


def _trials_note(results: Results, table: str) -> list[str]:
    """How much tuning each model had; nothing if none was tuned."""
    parts, tuned = [], False
    for model in results.models(table):
        trials = sorted({cell.trials or 0 for setting in results.settings(table)
                         for cell in results.cells(model, setting, table)})
        tuned = tuned or trials[-1] > 0
        parts.append(f"{model} {' to '.join(str(count) for count in sorted({trials[0], trials[-1]}))}")
    return [f"Tuning trials: {', '.join(parts)}."] if tuned else []


def _conditions_note(results: Results, table: str) -> list[str]:
    """What the runs of a table do not have in common; for throughput, how many ran side by side."""
    found: dict[str, set] = {}
    for cell in results.plan.cells:
        record = results.records.get(cell.folder, {})
        if cell.table == table and not cell.sweep:
            for name, value in {**record.get("versions", {}), "device": record.get("device"),
                                "threads": record.get("threads"),
                                "workers": record.get("workers")}.items():
                found.setdefault(name, set()).add(str(value))
    workers = found.pop("workers", {"1"})
    notes = [f"Not all runs had the same {name}: {', '.join(sorted(values))}."
             for name, values in found.items() if len(values) > 1]
    if any(metric.startswith(("throughput.", "seconds.")) for metric in results.plan.tables[table]) \
            and workers != {"1"}:
        notes.append(f"Measured with {' and '.join(sorted(workers))} runs side by side: times are only "
                     f"comparable with one.")
    return notes
