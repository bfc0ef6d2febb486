"""The options of ``ldznet encode`` that depend on each other."""

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app
from jobs.encode import choose_patience


@pytest.mark.parametrize(
    ("patience", "stall_minutes", "expected"),
    [(None, 15, 10), (None, 60, 10), (None, 3, 2), (7, 15, 7), (0, 0.5, 0), (14.9, 15, 14.9)],
)
def test_patience_is_chosen_below_what_a_hung_worker_has(patience, stall_minutes, expected):
    assert choose_patience(patience, stall_minutes=stall_minutes) == pytest.approx(expected)


def test_patience_of_no_less_is_refused_with_both_values():
    command = "encode --corpus a.tar --store store --spec s.yaml --patience 20 --stall-minutes 15"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2
    assert "--patience: expected less than --stall-minutes 15" in result.output
    assert "got 20" in result.output


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize("option", ["--split-gb", "--stall-minutes", "--patience"])
def test_a_number_that_is_not_finite_is_refused(option, value):
    command = f"encode --corpus a.tar --store store --spec s.yaml {option}={value}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2
    assert option in result.output
