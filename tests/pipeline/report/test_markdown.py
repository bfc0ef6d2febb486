"""Tables of figures: Markdown whose columns line up as plain text."""

import pytest

from pipeline.report.markdown import format_table


def test_columns_line_up_and_numbers_are_to_the_right():
    rows = [
        {"name": "a", "bytes": 1234567, "share": 0.51664, "note": None},
        {"name": "longer", "bytes": 8, "share": 105.0, "note": 12345.6},
    ]
    assert format_table(rows).splitlines() == [
        "| name   |     bytes |  share |  note |",
        "| ------ | --------: | -----: | ----: |",
        "| a      | 1,234,567 | 0.5166 |       |",
        "| longer |         8 |  105.0 | 12346 |",
    ]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (True, "yes"),
        (False, "no"),
        (999.94, "999.9"),
        (999.96, "1000"),
        (-999.96, "-1000"),
        (0.99999, "1.000"),
        (9_999_999.6, "1.000e+07"),
        (float("nan"), "nan"),
    ],
)
def test_a_value_reads_as_it_is(value, cell):
    assert format_table([{"x": value}]).splitlines()[2].strip("| ") == cell


def test_booleans_are_to_the_left_as_words():
    assert format_table([{"compile": True}, {"compile": False}]).splitlines()[1:] == [
        "| ------- |",
        "| yes     |",
        "| no      |",
    ]
