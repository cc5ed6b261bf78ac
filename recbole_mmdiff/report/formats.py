"""Grids as Markdown and LaTeX, results and statistics as CSV."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields

from recbole_mmdiff.report.results import Results
from recbole_mmdiff.report.statistics import PairedTest, summarize
from recbole_mmdiff.report.tables import Entry, Grid

_GREEK = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
_COMMANDS = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
             "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega")
#: pdflatex sets no Greek letter and no arrow outside of math
_LATEX = {**{letter: f"$\\{name}$" for letter, name in zip(_GREEK, _COMMANDS.split(), strict=True)},
          "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
          **{sign: f"\\{sign}" for sign in "&%$#_{}"},
          "<": "$<$", ">": "$>$", "|": r"\textbar{}", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$",
          "↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\rightarrow$", "≤": r"$\le$", "≥": r"$\ge$"}


def one_line(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", one_line(text)).replace("<", "&lt;")


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is; Greek letters, arrows and ± become math."""
    return "".join(_LATEX.get(sign, sign) for sign in one_line(text))


def slug(text: str) -> str:
    """A part of a file name: letters, digits, ``@``, ``-`` and ``.``, anything else as ``_``."""
    return re.sub(r"[^A-Za-z0-9@.-]+", "_", text).strip("._")[:80] or "_"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table of ready Markdown; the first ``left`` columns are set left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows])


def markdown(grid: Grid) -> str:
    """A grid as a GitHub-flavoured Markdown table with its notes below."""
    head = [markdown_text(" ".join(column)) for column in [*((label,) for label in grid.labels),
                                                           *grid.columns]]
    rows = [[*map(markdown_text, labels), *map(_markdown_entry, entries)]
            for labels, entries in grid.rows]
    notes = "".join(f"\n{markdown_text(note)}\n" for note in grid.notes)
    return markdown_table(head, rows, len(grid.labels)) + notes


def _markdown_entry(entry: Entry) -> str:
    text = markdown_text(entry.text)
    text = {"best": f"**{text}**", "second": f"<u>{text}</u>"}.get(entry.mark, text)
    return text + (r"\*" if entry.star else "") + (f" ({entry.remark})" if entry.remark else "")


def latex(grid: Grid, caption: str) -> str:
    """A grid as a LaTeX ``table`` float; needs the packages booktabs and graphicx."""
    lines = ["% \\usepackage{booktabs}, \\usepackage{graphicx}", r"\begin{table}", r"\centering",
             f"\\caption{{{latex_text(caption)}}}", f"\\label{{tab:{slug(grid.name)}}}",
             r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
             f"\\begin{{tabular}}{{{'l' * len(grid.labels)}{'r' * len(grid.columns)}}}", r"\toprule",
             *_latex_head(grid), r"\midrule"]
    before = None
    for labels, entries in grid.rows:
        shown = list(map(latex_text, labels))
        if len(labels) > 1:  # The setting stands once, above a rule between settings.
            if before == labels[0]:
                shown[0] = ""
            elif before is not None:
                lines.append(r"\midrule")
            before = labels[0]
        lines.append(" & ".join([*shown, *map(_latex_entry, entries)]) + r" \\")
    notes = [f"\\par\\smallskip\\footnotesize {latex_text(note)}" for note in grid.notes]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", *notes, r"\end{table}"]) + "\n"


def _latex_head(grid: Grid) -> list[str]:
    """One line, or two with the first level spanning its columns."""
    labels = [latex_text(label) for label in grid.labels]
    last = " & ".join([*labels, *(latex_text(column[-1]) for column in grid.columns)]) + r" \\"
    if not grid.columns or len(grid.columns[0]) == 1:
        return [last]
    spans, rules, at = [], [], len(labels) + 1
    for name, group in itertools.groupby(column[0] for column in grid.columns):
        width = len(list(group))
        spans.append(f"\\multicolumn{{{width}}}{{c}}{{{latex_text(name)}}}")
        rules.append(f"\\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    return [" & ".join([""] * len(labels) + spans) + r" \\", " ".join(rules), last]


def _latex_entry(entry: Entry) -> str:
    text = latex_text(entry.text)
    text = {"best": f"\\textbf{{{text}}}", "second": f"\\underline{{{text}}}"}.get(entry.mark, text)
    return text + ("$^{*}$" if entry.star else "") + (f" ({entry.remark})" if entry.remark else "")


def _csv(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Numbers in full precision; what is not there is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if isinstance(value, float) and math.isnan(value) else value for value in row]
                      for row in rows])
    return file.getvalue()


def results_csv(results: Results) -> str:
    """A line for each table, setting, metric and model: mean, sd, n, and the value of each seed."""
    rows = []
    for table, metrics in results.plan.tables.items():
        for setting, metric, model in itertools.product(
                results.settings(table), metrics, results.models(table)):
            values = results.values(model, setting, table, metric)
            rows.append([table, setting, metric, model, *astuple(summarize(values.values())),
                         *(values.get(seed, math.nan) for seed in results.plan.seeds)])
    seeds = [f"seed_{seed}" for seed in results.plan.seeds]
    return _csv(["table", "setting", "metric", "model", "mean", "sd", "n", *seeds], rows)


def statistics_csv(tests: Iterable[PairedTest]) -> str:
    """A line for each paired test; see ``PairedTest`` for the columns."""
    return _csv([field.name for field in fields(PairedTest)], (astuple(test) for test in tests))


def tuned_csv(results: Results) -> str:
    """A line for each key that trials chose, run after run; only the head if nothing was tuned."""
    rows = [[cell.table, cell.setting, cell.model, cell.seed, cell.trials, key, json.dumps(value)]
            for cell in results.plan.cells
            for key, value in (results.records.get(cell.folder, {}).get("tuned") or {}).items()]
    return _csv(["table", "setting", "model", "seed", "trials", "key", "value"], rows)
