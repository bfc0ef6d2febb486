"""Prompts encoded once: what is known, in which order rows come back, what goes first."""

import numpy as np

from pipeline.store.prompt_cache import PromptCache, count_bytes


def rows(*numbers):
    """A pass's result: a row of four float16 for each number."""
    return {"text": np.array([[number] * 4 for number in numbers], np.float16)}


def test_known_and_new_prompts_come_in_the_order_asked_for():
    cache = PromptCache()
    first = cache.merge(("a", "b"), {}, [rows(1, 2)])
    np.testing.assert_array_equal(first["text"], rows(1, 2)["text"])
    known = cache.get_known(("c", "b", "d", "a"))
    assert sorted(known) == ["a", "b"]
    filled = cache.merge(("c", "b", "d", "a"), known, [rows(3), rows(4)])  # two passes
    np.testing.assert_array_equal(filled["text"], rows(3, 2, 4, 1)["text"])
    assert sorted(cache.get_known(("a", "b", "c", "d"))) == ["a", "b", "c", "d"]


def test_all_known_needs_no_pass():
    cache = PromptCache()
    cache.merge(("a",), {}, [rows(1)])
    np.testing.assert_array_equal(
        cache.merge(("a",), cache.get_known("a"), [])["text"], rows(1)["text"]
    )


def test_what_was_asked_for_longest_ago_goes_first():
    cache = PromptCache(max_bytes=2 * 8)
    cache.merge(("a", "b"), {}, [rows(1, 2)])
    cache.get_known(("a",))
    cache.merge(("c",), {}, [rows(3)])
    assert sorted(cache.get_known(("a", "b", "c"))) == ["a", "c"]
    cache.merge(("a",), {}, [rows(9)])  # computed twice at once: counted once
    assert len(cache._held) == 2


def test_without_room_nothing_is_kept():
    cache = PromptCache(max_bytes=0)
    np.testing.assert_array_equal(cache.merge(("a", "b"), {}, [rows(1, 2)])["text"][1], [2] * 4)
    assert cache.get_known(("a", "b")) == {}


def test_a_kept_row_does_not_keep_its_batch():
    cache = PromptCache()
    cache.merge(("a",), {}, [rows(1)])
    assert cache.get_known("a")["a"]["text"].base is None
    assert count_bytes({"text": np.zeros(4, np.float16)}) == 8
