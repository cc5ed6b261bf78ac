"""Tables, their formats, and the comparison with published numbers."""

import csv
import io
import math
import re

import numpy as np
import pytest
import stores

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.report import Results, format_table
from recbole_mmdiff.report.formats import latex, latex_text, markdown_text, results_csv, slug, statistics_csv
from recbole_mmdiff.report.published import published_markdown, reproductions
from recbole_mmdiff.report.statistics import all_tests, row_means
from recbole_mmdiff.report.tables import build_table, decimals_for


def parse(text):
    """Head and rows of the Markdown table that a text begins with."""
    lines = [line for line in text.split("\n\n")[0].splitlines() if line]
    cells = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1 and set("".join(cells[1])) <= set("-:")
    return cells[0], cells[2:]


def only_row(results, ours=None):
    head, rows = parse(format_table(results, "table", ours))
    assert len(rows) == 1
    return dict(zip(head, rows[0], strict=True))


def test_marks_ties_and_improvement(one_row):
    row = only_row(one_row({"A": [0.9], "B": [0.80004], "C": [0.80001], "D": [1.0], "E": [0.9]}))
    # Equal as printed: both best; the next ones are second, and the best of all is C.
    assert row == {"setting": "s", "metric": "rating.mae ↓", "A": "<u>0.9000</u>", "B": "**0.8000**",
                   "C": "**0.8000**", "D": "1.0000", "E": "<u>0.9000</u>", "improvement %": "+0.00"}


def test_ranks_are_decided_before_rounding(one_row):
    results = one_row({"A": [0.50004], "B": [0.50006], "C": [0.4]}, metric="ranking_full.hit@10")
    row = only_row(results)
    assert (row["A"], row["B"], row["C"]) == ("<u>0.5000</u>", "**0.5001**", "0.4000")


def test_what_stands_where_there_is_no_value(one_row):
    row = only_row(one_row({"A": [0.5, 0.7, "failed"], "B": [None, None, None], "C": ["failed"] * 3,
                            "D": ["pending"] * 3, "E": ["failed", "pending", None], "F": [0.75, 0.75, 0.75],
                            "G": [0.9]}))
    assert row["A"] == "**0.6000 ± 0.1414** (2/3 seeds)"
    assert [row[model] for model in "BCDE"] == ["n/a", "failed", "pending", "failed"]
    assert (row["F"], row["G"]) == ("<u>0.7500 ± 0.0000</u>", "0.9000")
    assert row["improvement %"] == "+20.00 (unequal seeds)"


def test_one_model_alone_is_not_the_best(one_row):
    row = only_row(one_row({"A": [0.5, 0.6]}))
    assert (row["A"], row["improvement %"]) == ("0.5500 ± 0.0707", "n/a")


def with_users(gap):
    tokens, taste = [f"u{number}" for number in range(50)], np.random.default_rng(0).normal(1, 0.2, 50)
    noise = np.random.default_rng(1).normal(0, 0.1, (3, 50))
    values = {"A": taste + noise[0], "B": taste + noise[1] + gap, "C": taste + noise[2] + 5}
    return {(model, 2020): (tokens, {"mae": value}) for model, value in values.items()}


@pytest.mark.parametrize("gap, starred", [(0.0, False), (0.5, True)])
def test_the_star_is_the_corrected_test_against_the_best_other(one_row, gap, starred):
    results = one_row({"A": [1.0], "B": [1.1], "C": [6.0]}, per_user=with_users(gap))
    row = only_row(results)
    assert row["A"] == "**1.0000**" + r"\*" * starred
    assert "*" not in row["B"].replace("**", "") + row["C"]
    # A model of ours that is significantly worse has none.
    assert only_row(results, ["C"])["C"] == "6.0000"
    note = "paired t-test over the values of users" if starred else "No star: the best model of the row"
    assert note in format_table(results, "table")


def test_without_values_by_user_the_note_says_so(one_row):
    text = format_table(one_row({"A": [1.0, 2.0], "B": [1.1, 2.0]}), "table")
    assert "No tests over users" in text and "paired t-test" not in text


def test_models_as_rows_hold_the_same_cells(results):
    head, rows = parse(format_table(results, "rating"))
    turned_head, turned = parse(format_table(results, "rating", rows="models"))
    assert len(rows) == 6 and len(turned) == len(stores.MODELS) + 1
    assert turned_head[1:] == [" ".join(row[:2]) for row in rows]
    assert [[row[at] for row in rows] for at in range(2, len(head))] == [row[1:] for row in turned]
    assert [row[0] for row in turned] == head[2:]


def test_notes_below(tmp_path):
    cells = [stores.cell("MF", "s", "rating", 1, trials=30), stores.cell("CMF", "s", "rating", 1)]
    for cell in cells:
        stores.finish(tmp_path, cell, {"rating.mae": 1.0})
    stores.write_plan(tmp_path, cells, ["MF", "BPR", "CMF"], ["s"], [1], ours=["MF"])
    text = format_table(Results.load(tmp_path), "rating")
    assert "Tuning trials: MF 30, CMF 0." in text
    assert "n/a in the whole table: BPR." in text and "BPR" not in parse(text)[0]
    assert "1 seed(s)" in text
    empty = format_table(Results.load(tmp_path), "ranking")
    assert parse(empty) == (["setting", "metric", "improvement %"], [])
    assert parse(format_table(Results.load(tmp_path), "ranking", rows="models"))[1] == [["improvement %"]]


def test_an_unknown_table(results):
    with pytest.raises(ConfigError, match=r"table: 'ratings'.*did you mean 'rating'"):
        format_table(results, "ratings")


@pytest.mark.parametrize("values, decimals", [
    ([0.5], 4), ([3.2, 0.1], 4), ([45.6], 2), ([1234567.0], 0), ([0.00123], 6), ([0.0], 4), ([math.nan], 4),
    ([], 4), ([1e-12], 8)])
def test_decimals(values, decimals):
    assert decimals_for(values) == decimals


def test_labels_cannot_break_a_table(one_row):
    labels = ["a|b", "c\nd", r"e\|f", "<script>", "*bold*", "[x](y)", "`z`"]
    results = one_row({label: [0.5] for label in labels}, setting="β=20% | x")
    head, rows = parse(format_table(results, "table"))
    assert len(head) == len(labels) + 3 and rows[0][0] == r"β=20% \| x"
    assert "<script" not in "".join(head) and r"\[x\]" in head[7]
    assert markdown_text("a_b 20% & β") == "a_b 20% & β"


def test_latex_escapes():
    assert latex_text("β=20%_&#${}~^\\<") == (r"$\beta$=20\%\_\&\#\$\{\}\textasciitilde{}\textasciicircum{}"
                                              r"\textbackslash{}$<$")


@pytest.mark.parametrize("rows", ["settings", "models"])
def test_latex_is_whole(one_row, rows):
    results = one_row({"A_1": [0.5, 0.6], "B&C": [0.7, 0.8], "D": ["failed"] * 2}, setting="β=20%",
                      per_user={})
    text = latex(build_table(results, "table", rows=rows), "100% & more")
    assert r"\caption{100\% \& more}" in text and r"$\beta$=20\%" in text and r"A\_1" in text
    assert r"\textbf{0.5500 $\pm$ 0.0707}" in text and r"\underline{0.7500 $\pm$ 0.0707}" in text
    assert text.count("{") == text.count("}") and "β" not in text and "±" not in text
    for name in ("table", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1
    columns = len(re.search(r"\\begin{tabular}{(\w+)}", text)[1])
    body = text[text.index(r"\toprule"):text.index(r"\bottomrule")]
    for line in body.splitlines():
        if line.endswith(r"\\"):
            spans = [int(span) for span in re.findall(r"\\multicolumn{(\d+)}", line)]
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) - len(spans) == columns


def test_settings_are_apart_in_latex(results):
    text = latex(build_table(results, "rating"), "x")
    assert text.count(r"\midrule") == 3 and text.count(r"$\beta$=20\% &") == 1


def test_csv_reads_back_to_the_exact_values(results):
    rows = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert len(rows) == 2 * 2 * 3 * 4
    for row in rows:
        place = row["model"], row["setting"], row["table"], row["metric"]
        values = results.values(*place)
        assert {seed: float(row[f"seed_{seed}"]) for seed in stores.SEEDS} == values
        summary = row_means(results, row["table"], row["setting"], row["metric"])[row["model"]]
        assert (float(row["mean"]), float(row["sd"]), int(row["n"])) == (summary.mean, summary.sd, 3)
    tests = all_tests(results, ["MF"])
    written = list(csv.DictReader(io.StringIO(statistics_csv(tests))))
    assert [float(row["holm_p"]) for row in written] == [test.holm_p for test in tests]
    assert [float(row["statistic"]) for row in written] == [test.statistic for test in tests]


def test_what_is_not_there_is_empty_in_csv(one_row):
    results = one_row({"A": [0.5, "failed"], "B,\"x\"": [None, None]})
    rows = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert [rows[0][name] for name in ("mean", "sd", "n", "seed_2020", "seed_2021")] == \
        ["0.5", "", "1", "0.5", ""]
    assert rows[1]["model"] == "B,\"x\"" and rows[1]["mean"] == "" and rows[1]["n"] == "0"


@pytest.mark.parametrize("text, name", [("rating.mae", "rating.mae"), ("ndcg@20", "ndcg@20"),
                                        ("../../etc/x y", "etc_x_y"), ("β", "_"), ("", "_")])
def test_slugs(text, name):
    assert slug(text) == name


def test_verdicts(one_row):
    published = {"source": "Table 2 of a | b", "note": "Other split.", "models": ["A", "B", "XX"],
                 "tolerance": {"rating.mae": 0.05},
                 "values": {"s": {"rating.mae": [1.0, 1.0, 1.0], "rating.rmse": [1.0, None, None]},
                            "t": {"rating.mae": [2.0, None, None]}}}
    results = one_row({"A": [1.04, 1.06], "B": [0.94, 0.94], "C": [1, 1]}, published=published)
    found = {(entry.setting, entry.metric, entry.model): entry
             for entry in reproductions(results, results.plan.published)}
    verdicts = {place: entry.verdict for place, entry in found.items()}
    assert verdicts == {("s", "rating.mae", "A"): "reproduced", ("s", "rating.mae", "B"): "not reproduced",
                        ("s", "rating.mae", "XX"): "not run", ("s", "rating.rmse", "A"): "not run",
                        ("t", "rating.mae", "A"): "not run"}
    assert found["s", "rating.mae", "B"].relative == pytest.approx(-0.06)
    text = published_markdown(results)
    assert "1 of 2 judged numbers are reproduced; 0 not judged, 3 not run." in text
    assert "Other split." in text and r"Table 2 of a \| b" in text
    _, rows = parse(text[text.index("| setting"):])
    assert rows[0] == ["s", "rating.mae ↓", "A", "1.0000", "1.0500 ± 0.0141", "+5.0%", "5.0%", "reproduced"]


@pytest.mark.parametrize("value, tolerance", [(1.0, {}), (0.0, {"rating.mae": 0.1})])
def test_without_a_tolerance_or_a_relative_difference_nothing_is_judged(one_row, value, tolerance):
    published = {"source": "x", "models": ["A"], "tolerance": tolerance,
                 "values": {"s": {"rating.mae": [value]}}}
    results = one_row({"A": [1.0], "B": [1.0]}, published=published)
    entry, = reproductions(results, results.plan.published)
    assert entry.verdict == "not judged"
