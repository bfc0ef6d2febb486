"""A JSON list's items one at a time are those of the list parsed whole."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.json_list import iterate_items, read_json_text
from pipeline.base.yaml import SpecError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.sampled_from(["", " \n\t"]))
def test_items_are_those_of_the_whole(values, indent, space):
    text = space + json.dumps(values, indent=indent) + space
    items = list(iterate_items(text, where="x.json"))
    assert [item.value for item in items] == values
    assert [json.loads(text[item.start : item.end]) for item in items] == values


@pytest.mark.parametrize(
    "text",
    ["", "{}", "1", "[", "[1", "[1,", "[1,]", "[1 2]", "[1]]", "[1] x", "[nan]", '["a', ",1]", "]"],
)
def test_what_is_no_whole_list_is_refused(text):
    with pytest.raises(SpecError, match=r"x\.json"):
        list(iterate_items(text, where="x.json"))


@given(st.lists(JSON, min_size=1, max_size=4), st.data())
def test_a_list_cut_anywhere_is_refused(values, data):
    text = json.dumps(values)
    with pytest.raises(SpecError):
        list(iterate_items(text[: data.draw(st.integers(0, len(text) - 1))], where="x.json"))


def test_nesting_without_end_is_refused():
    with pytest.raises(SpecError, match="fetch it again"):
        list(iterate_items("[" * 200_000, where="x.json"))


def test_a_file_is_read_with_a_byte_order_mark_and_its_absence_told(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert [i.value for i in iterate_items(read_json_text(tmp_path / "x.json"), where="x")] == [1]
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    for name in ("latin.json", "none.json"):
        with pytest.raises(SpecError, match=name):
            read_json_text(tmp_path / name)
