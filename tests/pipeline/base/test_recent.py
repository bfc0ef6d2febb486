"""What was made last is kept, up to a cost."""

import pytest

from pipeline.base.recent import Recent


def test_what_was_used_last_is_kept():
    made = []

    def find(key):
        return recent.find(key, lambda: made.append(key) or key.upper())

    recent = Recent(2)
    assert [find(key) for key in "abacab"] == list("ABACAB")
    assert made == ["a", "b", "c", "b"]
    assert recent.cost == 2


def test_costs_add_up_and_one_value_is_always_kept():
    recent = Recent(10, cost=len)
    recent.find("x", lambda: "1234567")
    recent.find("y", lambda: "123")
    assert recent.cost == 10
    recent.find("z", lambda: "1" * 50)
    assert recent.cost == 50
    assert recent.find("z", lambda: "") == "1" * 50
    recent.forget("z")
    recent.forget("z")
    assert recent.cost == 0
    recent.find("x", lambda: "12")
    recent.clear()
    assert recent.cost == 0
    assert recent.find("x", lambda: "3") == "3"


def test_what_was_made_elsewhere_is_kept_where_it_fits():
    recent = Recent(10, cost=len)
    assert recent.peek("x") is None
    recent.keep("x", "1234567")
    recent.keep("y", "123")
    recent.keep("y", "another")
    assert (recent.peek("x"), recent.peek("y"), recent.cost) == ("1234567", "123", 10)
    recent.peek("x")
    recent.keep("z", "1")
    assert (recent.peek("x"), recent.peek("y"), len(recent)) == ("1234567", None, 2)
    recent.keep("large", "1" * 11)
    assert (recent.peek("large"), recent.cost) == (None, 8)
    recent = Recent(0, cost=len)
    recent.keep("x", "1")
    assert len(recent) == 0


def test_an_error_is_not_kept():
    recent = Recent(3)
    with pytest.raises(ZeroDivisionError, match="zero"):
        recent.find("x", lambda: 1 // 0)
    assert recent.find("x", lambda: 1) == 1
