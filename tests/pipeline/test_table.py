"""Tables of figures: Markdown whose columns line up as plain text."""

from pipeline.table import format_table


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
