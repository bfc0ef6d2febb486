import html
import math
import re

import pytest

from pipeline.report.page import Report, render_report
from pipeline.report.tables import EffectRow, ResultRow


def render_results(rows, note=""):
    return render_report(Report("Demo", "", results=rows, results_note=note))


def render_effects(rows):
    return render_report(Report("Demo", "", effects=rows))


def strip_tags(cell):
    return html.unescape(re.sub("<.*?>", "", cell))


def read_row(text, name):
    """A row's numbers with their tags; ``name`` is the head, or what an effect compared."""
    row = re.search(rf"<tr>(?:(?!</tr>).)*<bdi>{re.escape(name)}</bdi>.*?</tr>", text)
    cells = re.findall(r'<td class="number">(.*?)</td>', row.group())
    return [cell.replace('<span class="spread"></span>', "") for cell in cells]


def read_lines(text):
    """The first cell of every row below the header, top to bottom."""
    body = text.partition("</thead>")[2].partition("</table>")[0]
    return [strip_tags(cell).strip() for cell in re.findall("<tr.*?>(<th.*?)</th>", body)]


def read_header(text):
    cells = re.findall("<th .*?</th>", text.partition("</thead>")[0])
    return [strip_tags(cell) for cell in cells]


def make_effect(difference=0.031, deviation=0.004, verdict="yes"):
    differences, deviations = (difference, difference), (deviation, None)
    return EffectRow("Does z beat RGB?", "ZNet − RGBNet", differences, deviations, verdict)


def test_scores_are_percentages_with_one_decimal():
    text = render_results([ResultRow("LD-ZNet", (0.52749, 0.6, 1.0))])
    assert read_row(text, "LD-ZNet") == ["<b>52.7</b>", "<b>60.0</b>", "<b>100.0</b>"]


def test_best_of_each_column_is_bold_and_ties_share():
    rows = [
        ResultRow("ZNet", (0.50, 0.59999, 0.3)),
        ResultRow("LD-ZNet", (0.51, 0.60001, math.nan)),
        ResultRow("all foreground", (0.10, 0.1, 0.4), baseline=True),
    ]
    text = render_results(rows)
    assert read_row(text, "ZNet") == ["50.0", "<b>60.0</b>", "30.0"]
    assert read_row(text, "LD-ZNet") == ["<b>51.0</b>", "<b>60.0</b>", "–"]
    assert read_row(text, "all foreground") == ["10.0", "10.0", "<b>40.0</b>"]


def test_best_is_sought_in_each_group():
    rows = [
        ResultRow("ZNet", (0.8, 0.8, 0.8), group="seen"),
        ResultRow("LD-ZNet", (0.9, 0.9, 0.9), group="seen"),
        ResultRow("ZNet 2", (0.3, 0.3, math.nan), group="unseen"),
        ResultRow("LD-ZNet 2", (0.2, 0.3, math.nan), group="unseen"),
    ]
    text = render_results(rows)
    assert read_row(text, "ZNet") == ["80.0"] * 3
    assert read_row(text, "ZNet 2") == ["<b>30.0</b>", "<b>30.0</b>", "–"]
    assert read_row(text, "LD-ZNet 2") == ["20.0", "<b>30.0</b>", "–"]
    assert "in each group" in text
    assert "in each group" not in render_results(rows[:2])


def test_best_is_the_best_mean_whatever_its_spread():
    rows = [
        ResultRow("ZNet", (0.50, 0.5, 0.5), deviations=(0.3, 0.3, 0.3)),
        ResultRow("LD-ZNet", (0.51, 0.51, 0.51), deviations=(0.0, 0.0, 0.0)),
    ]
    text = render_results(rows)
    assert "<b>" not in "".join(read_row(text, "ZNet"))
    assert "".join(read_row(text, "LD-ZNet")).count("<b>51.0</b>") == 3


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite_is_a_dash(score):
    row = ResultRow("ZNet", (score, score, score), deviations=(math.nan, 0.1, math.inf))
    for given in (row, ResultRow("ZNet", (score, score, score))):
        text = render_results([given])
        assert [strip_tags(cell) for cell in read_row(text, "ZNet")] == ["–", "–", "–"]


def test_baselines_come_last_and_apart():
    rows = [
        ResultRow("all foreground", (0.1, 0.1, 0.1), baseline=True),
        ResultRow("ZNet", (0, 0, 0)),
    ]
    text = render_results(rows)
    heads, baselines = text.split('<tbody class="baseline">')
    assert "<bdi>ZNet</bdi>" in heads
    assert "<bdi>all foreground</bdi>" in baselines
    assert read_lines(text) == ["ZNet", "Trivial baselines", "all foreground"]


def test_rows_of_a_group_stand_under_its_name_in_order_of_first_appearance():
    rows = [
        ResultRow("ZNet", (0.5, 0.5, 0.5), group="unseen"),
        ResultRow("alone", (0.5, 0.5, 0.5)),
        ResultRow("mask", (0.1, 0.1, 0.1), baseline=True, group="unseen"),
        ResultRow("ZNet", (0.5, 0.5, 0.5), group="another look"),
        ResultRow("LD-ZNet", (0.5, 0.5, 0.5), group="unseen"),
    ]
    assert read_lines(render_results(rows)) == [
        *("unseen", "ZNet", "LD-ZNet", "Trivial baselines", "mask"),
        "alone",
        *("another look", "ZNet"),
    ]


def test_deviations_stand_beside_the_means_and_leave_their_room_where_there_are_none():
    rows = [
        ResultRow("ZNet", (0.52749, 0.6, 0.7), deviations=(0.0031, 0.1234, math.nan)),
        ResultRow("mask", (0.1, 0.1, 0.1), baseline=True),
    ]
    text = render_results(rows)
    cells = [strip_tags(cell) for cell in read_row(text, "ZNet")]
    assert cells == ["52.7 ± 0.3", "60.0 ± 12.3", "70.0 ± –"]
    assert text.count('10.0<span class="spread"></span>') == 3
    assert "± is the sample standard deviation" in text


def test_a_single_run_has_no_deviations():
    text = render_results([ResultRow("RGBNet", (0.4, 0.4, 0.4), group="seen")])
    assert read_header(text) == ["Head", "mIoU", "IoU FG", "AP", "threshold"]
    assert "±" not in text


def test_note_of_the_results_stands_above_the_metrics():
    rows = [ResultRow("ZNet", (0.5, 0.5, 0.5))]
    notes = re.findall('<p class="note">(.*?)</p>', render_results(rows, "Two groups."), re.DOTALL)
    assert notes[0] == "Two groups."
    assert notes[1:] == re.findall('<p class="note">(.*?)</p>', render_results(rows), re.DOTALL)


@pytest.mark.parametrize(
    ("difference", "shown"),
    [
        (0.031, "+3.1"),
        (-0.0021, "−0.2"),
        (0.0004, "0.0"),
        (-0.0004, "0.0"),
        (0.0, "0.0"),
        (-1.0, "−100.0"),
    ],
)
def test_differences_are_points_with_a_sign_where_they_show_one(difference, shown):
    row = read_row(render_effects([make_effect(difference)]), "ZNet − RGBNet")
    assert [strip_tags(cell) for cell in row] == [f"{shown} ± 0.4", shown]


@pytest.mark.parametrize("difference", [math.nan, math.inf, -math.inf])
def test_difference_that_is_not_finite_is_a_dash(difference):
    row = read_row(render_effects([make_effect(difference)]), "ZNet − RGBNet")
    assert [strip_tags(cell) for cell in row] == ["–", "–"]


def test_deviation_of_an_effect_that_is_not_finite_is_a_dash():
    row = read_row(render_effects([make_effect(deviation=math.nan)]), "ZNet − RGBNet")
    assert strip_tags(row[0]) == "+3.1 ± –"


def test_effect_asks_names_what_it_compared_and_answers():
    text = render_effects([make_effect(deviation=None, verdict="one seed")])
    assert read_header(text) == ["Question", "mIoU", "AP", "Answer"]
    assert read_lines(text) == ["Does z beat RGB? ZNet − RGBNet"]
    assert read_row(text, "ZNet − RGBNet") == ["+3.1", "+3.1"]
    assert '<td class="verdict">one seed</td>' in text


def test_the_threshold_of_the_miou_stands_beside_the_scores():
    rows = [ResultRow("ZNet", (0.1, 0.1, 0.1), threshold=0.34), ResultRow("z", (0.1, 0.1, 0.1))]
    cells = re.findall('<td class="number threshold">(.*?)</td>', render_results(rows))
    assert cells == ["0.34", "–"]
