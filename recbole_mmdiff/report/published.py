"""Our numbers beside those of a paper."""

import math
from dataclasses import dataclass

from recbole_mmdiff.report.formats import markdown_table, markdown_text
from recbole_mmdiff.report.plan import Published
from recbole_mmdiff.report.results import Results
from recbole_mmdiff.report.statistics import Summary, summarize
from recbole_mmdiff.report.tables import NONE, decimals_for, mean_and_sd, with_arrow

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_JUDGED, NOT_RUN = "not judged", "not run"


@dataclass(frozen=True)
class Reproduction:
    """One published number, ours, and the verdict.

    ``relative`` is (ours - published) / |published|; it and ``tolerance`` are NaN where there is none.
    """

    setting: str
    metric: str
    model: str
    published: float
    ours: Summary
    relative: float
    tolerance: float
    verdict: str


def reproductions(results: Results, published: Published) -> list[Reproduction]:
    """Every published number beside ours: the mean over the seeds that are done.

    ``reproduced`` if the relative difference is within the metric's tolerance, to either side;
    ``not judged`` if the metric has none; ``not run`` if we have no value.
    """
    found = []
    for setting, metrics in published.values.items():
        for metric, row in metrics.items():
            for model, value in zip(published.models, row, strict=True):
                if value is not None:
                    ours = _our_value(results, model, setting, metric)
                    found.append(_judge(setting, metric, model, value, ours,
                                        published.tolerance.get(metric, math.nan)))
    return found


def _our_value(results: Results, model: str, setting: str, metric: str) -> Summary:
    """Out of the first table with the metric in which the model has a value."""
    summaries = [summarize(results.values(model, setting, table, metric).values())
                 for table, metrics in results.plan.tables.items() if metric in metrics]
    return next((summary for summary in summaries if summary.n), summarize([]))


def _judge(setting, metric, model, value, ours, tolerance) -> Reproduction:
    relative = (ours.mean - value) / abs(value) if value else math.nan
    if not ours.n:
        verdict = NOT_RUN
    elif math.isnan(tolerance) or math.isnan(relative):
        verdict = NOT_JUDGED
    else:
        # 1.05 is within 5% of 1, which it is not in binary.
        verdict = REPRODUCED if abs(relative) <= tolerance + 1e-9 else NOT_REPRODUCED
    return Reproduction(setting, metric, model, value, ours, relative, tolerance, verdict)


def published_markdown(results: Results) -> str:
    """The page that compares with the paper; the plan must have published numbers."""
    published = results.plan.published
    found = reproductions(results, published)
    verdicts = [entry.verdict for entry in found]
    judged = verdicts.count(REPRODUCED) + verdicts.count(NOT_REPRODUCED)
    head = ["setting", "metric", "model", "published", "ours", "difference", "tolerance", "verdict"]
    lines = [f"# {markdown_text(results.plan.name)}: beside the published numbers\n",
             f"Published: {markdown_text(published.source)}.\n"]
    if published.note:
        lines.append(f"{markdown_text(published.note)}\n")
    lines.append(f"{verdicts.count(REPRODUCED)} of {judged} judged numbers are reproduced; "
                 f"{verdicts.count(NOT_JUDGED)} not judged, {verdicts.count(NOT_RUN)} not run.\n")
    lines.append(markdown_table(head, [_line(entry) for entry in found], 3))
    lines.append("Ours: mean ± sample standard deviation over seeds. Difference: (ours - published) / "
                 "published. A number is reproduced if the difference is within the tolerance.\n")
    return "\n".join(lines)


def _line(entry: Reproduction) -> list[str]:
    decimals = decimals_for([entry.published])
    return [*map(markdown_text, (entry.setting, with_arrow(entry.metric), entry.model)),
            f"{entry.published:.{decimals}f}",
            mean_and_sd(entry.ours, decimals) if entry.ours.n else NONE,
            NONE if math.isnan(entry.relative) else f"{entry.relative:+.1%}",
            "none" if math.isnan(entry.tolerance) else f"{entry.tolerance:.1%}", entry.verdict]
