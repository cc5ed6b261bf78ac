"""Average ranks over blocks: Friedman's test, Nemenyi's critical difference, and their diagram.

J. Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 7 (2006).
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from recbole_mmdiff.report.figures import new_figure, save, shorten, styled
from recbole_mmdiff.report.results import Results, smaller_is_better

LEVEL = 0.05
LEAST = 3


@dataclass(frozen=True)
class Ranking:
    """Average ranks of models over blocks (rank 1 is best, ties share the mean rank).

    Attributes:
        models: best first.
        ranks: (k,) their average ranks.
        blocks: the number n of blocks.
        friedman_p: p of Friedman's test; 1 if all models are equal in every block.
        critical_difference: ranks further apart than this differ at the level .05 (Nemenyi).
    """

    models: tuple[str, ...]
    ranks: tuple[float, ...]
    blocks: int
    friedman_p: float
    critical_difference: float

    def cliques(self) -> list[tuple[int, int]]:
        """(first, last) of every maximal group of models that the test cannot tell apart."""
        found = []
        for first, rank in enumerate(self.ranks):
            last = max(at for at, other in enumerate(self.ranks)
                       if other - rank <= self.critical_difference)
            if last > first and (not found or last > found[-1][1]):
                found.append((first, last))
        return found


def block_values(results: Results, table: str, metric: str) -> tuple[list[str], np.ndarray]:
    """The models with any value, and (blocks, models) values where all of them have one.

    A block is a setting with a seed.
    """
    models = results.models(table)
    values = np.array([[results.values(model, setting, table, metric).get(seed, math.nan)
                        for model in models]
                       for setting in results.settings(table) for seed in results.plan.seeds])
    values = values.reshape(-1, len(models))
    there = np.isfinite(values).any(axis=0)
    values = values[:, there]
    return ([model for model, some in zip(models, there, strict=True) if some],
            values[np.isfinite(values).all(axis=1)])


def rank_models(models: list[str], values: np.ndarray, smaller: bool) -> Ranking:
    """Rank models within blocks.

    Args:
        models: k >= 3 labels.
        values: (n, k) values, n >= 2, all finite.
        smaller: whether the smallest value is the best.
    """
    blocks, count = values.shape
    average = stats.rankdata(values if smaller else -values, axis=1).mean(axis=0)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # All equal: 0 / 0.
        p = float(stats.friedmanchisquare(*values.T).pvalue)
    quantile = stats.studentized_range.ppf(1 - LEVEL, count, np.inf) / math.sqrt(2)
    order = np.argsort(average, kind="stable")
    return Ranking(tuple(models[at] for at in order), tuple(average[order].tolist()), blocks,
                   1.0 if math.isnan(p) else p,
                   float(quantile * math.sqrt(count * (count + 1) / (6 * blocks))))


def too_few(models: list[str], values: np.ndarray) -> str | None:
    """Why there is no diagram, or None if there is one."""
    if len(models) < LEAST:
        return f"{len(models)} models have values, it takes {LEAST}"
    if len(values) < LEAST:
        return f"all {len(models)} models have values in {len(values)} blocks (setting and seed), it " \
               f"takes {LEAST}"
    return None


@styled
def critical_difference_plot(results: Results, table: str, metric: str, path: Path,
                             pdf: bool = False) -> list[Path]:
    """The models along their average ranks; bars join those that the test cannot tell apart.

    Args:
        path: of the picture, without suffix.

    Returns:
        The written files; none if there are too few models or blocks (see ``too_few``).
    """
    models, values = block_values(results, table, metric)
    if too_few(models, values):
        return []
    ranking = rank_models(models, values, smaller_is_better(metric))
    count, cliques = len(models), ranking.cliques()
    left, step, gap = -(-count // 2), 0.3, 0.16
    base = 0.35 + gap * len(cliques)
    depth = base + step * left
    figure = new_figure(8, 1.5 + depth)
    axes = figure.add_subplot()
    axes.axis("off")
    margin = 0.42 * (count - 1)
    axes.set(xlim=(1 - margin, count + margin), ylim=(-depth, 0.9))
    _draw_axis(axes, count, ranking.critical_difference)
    for at, (model, rank) in enumerate(zip(ranking.models, ranking.ranks, strict=True)):
        on_left = at < left
        y = -base - step * (at if on_left else count - 1 - at)
        end = 1 - 0.04 * margin if on_left else count + 0.04 * margin
        axes.plot([rank, rank, end], [0, y, y], color="#444444", lw=1, solid_joinstyle="miter")
        axes.text(end, y, f" {shorten(model, 26)} ({rank:.2f}) ", va="center",
                  ha="right" if on_left else "left")
    for line, (first, last) in enumerate(cliques):
        axes.plot([ranking.ranks[first] - 0.03, ranking.ranks[last] + 0.03], [-0.2 - gap * line] * 2,
                  color="#D55E00", lw=4, solid_capstyle="butt")
    found = "no difference shown" if ranking.friedman_p >= LEVEL else "the models differ"
    figure.suptitle(f"{metric}: average rank over {ranking.blocks} blocks (setting, seed; seeds share data)\n"
                    f"Friedman p = {ranking.friedman_p:.2g} ({found})\n"
                    f"bars join models within the critical difference (Nemenyi, {LEVEL})", fontsize=10)
    return save(figure, path, pdf)


def _draw_axis(axes, count: int, critical_difference: float) -> None:
    """The scale of ranks, and above it the length of the critical difference."""
    axes.plot([1, count], [0, 0], color="black", lw=1.2)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [0, 0.08], color="black", lw=1.2)
        axes.text(rank, 0.12, str(rank), ha="center", va="bottom", fontsize=9)
    length = min(critical_difference, count - 1)
    note = " (more than the whole axis)" if critical_difference > count - 1 else ""
    axes.plot([1, 1 + length], [0.5, 0.5], color="#D55E00", lw=2)
    axes.text(1, 0.58, f"critical difference {critical_difference:.2f}{note}", va="bottom", ha="left",
              fontsize=9)
