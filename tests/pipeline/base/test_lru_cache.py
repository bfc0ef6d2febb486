"""The LRU cache keeps what was used last, up to a cost."""

import pytest

from pipeline.base.lru_cache import LruCache


def test_what_was_used_last_is_kept():
    made = []

    def find(key):
        return cache.get_or_make(key, lambda: made.append(key) or key.upper())

    cache = LruCache(2)
    assert [find(key) for key in "abacab"] == list("ABACAB")
    assert made == ["a", "b", "c", "b"]
    assert cache.cost == 2


def test_costs_add_up_and_one_value_is_always_kept():
    cache = LruCache(10, cost=len)
    cache.get_or_make("x", lambda: "1234567")
    cache.get_or_make("y", lambda: "123")
    assert cache.cost == 10
    cache.get_or_make("z", lambda: "1" * 50)
    assert cache.cost == 50
    assert cache.get_or_make("z", lambda: "") == "1" * 50
    cache.remove("z")
    cache.remove("z")
    assert cache.cost == 0
    cache.get_or_make("x", lambda: "12")
    cache.clear()
    assert cache.cost == 0
    assert cache.get_or_make("x", lambda: "3") == "3"


def test_what_was_made_elsewhere_is_kept_where_it_fits():
    cache = LruCache(10, cost=len)
    assert cache.get("x") is None
    cache.put("x", "1234567")
    cache.put("y", "123")
    cache.put("y", "another")
    assert (cache.get("x"), cache.get("y"), cache.cost) == ("1234567", "123", 10)
    cache.get("x")
    cache.put("z", "1")
    assert (cache.get("x"), cache.get("y"), len(cache)) == ("1234567", None, 2)
    cache.put("large", "1" * 11)
    assert (cache.get("large"), cache.cost) == (None, 8)
    cache = LruCache(0, cost=len)
    cache.put("x", "1")
    assert len(cache) == 0


def test_an_error_is_not_kept():
    cache = LruCache(3)
    with pytest.raises(ZeroDivisionError, match="zero"):
        cache.get_or_make("x", lambda: 1 // 0)
    assert cache.get_or_make("x", lambda: 1) == 1
