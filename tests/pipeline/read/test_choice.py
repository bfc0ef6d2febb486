"""Filters and splits of pairs."""

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipeline.base.yaml import SpecError
from pipeline.read.choice import PairChoice, hash_key

INDEX = pa.table(
    {
        "key": ["a", "a", "b", "c", "c"],
        "phrase": ["red circle", "circle", "Red square", "tree", "a red thing"],
        "mask_area": pa.array([0.1, 0.2, 0.3, 0.4, 1.0], pa.float32()),
    }
)


@pytest.mark.parametrize(
    ("choice", "rows"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"min_area": 0.2}, [1, 2, 3, 4]),
        ({"max_area": 0.1}, [0]),
        ({"min_area": 0.3, "max_area": 0.4}, [2, 3]),
        ({"phrase": "red"}, [0, 4]),
        ({"phrase": "^(?i)red"}, [0, 2]),
        ({"phrase": "red", "min_area": 0.5}, [4]),
        ({"phrase": "none"}, []),
        ({"without_phrase": "red"}, [1, 2, 3]),
        ({"phrase": "circle", "without_phrase": "^red"}, [1]),
    ],
)
def test_conditions_together_choose_rows(choice, rows):
    found = PairChoice(**choice).select(INDEX)
    assert found.tolist() == rows
    assert found.dtype == np.int32
    assert PairChoice(**choice).takes_all == (not choice)


def test_a_key_lies_where_it_always_did():
    """Pinned: another place would move images between training and validation."""
    assert hash_key("scene-000001", 0) == PINNED
    assert hash_key("scene-000001", 1) != PINNED


PINNED = 0.9900381068829792


def test_a_share_of_keys_is_that_share_and_whole_images():
    keys = [f"image-{number:05d}" for number in range(4000) for _ in range(2)]
    table = pa.table(
        {
            "key": pa.chunked_array([keys[:3001], keys[3001:]]),
            "phrase": ["x"] * 8000,
            "mask_area": pa.array([0.5] * 8000, pa.float32()),
        }
    )
    parts = [
        PairChoice(keys_from=low, keys_to=high).select(table).tolist()
        for low, high in ((0, 0.1), (0.1, 0.4), (0.4, 1))
    ]
    assert sorted(row for part in parts for row in part) == list(range(8000))
    assert [len(part) / 8000 for part in parts] == pytest.approx([0.1, 0.3, 0.6], abs=0.02)
    assert all(row ^ 1 in set(part) for part in parts for row in part[:50])


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"min_area": 0.5, "max_area": 0.4}, "min_area must be at most max_area"),
        ({"keys_from": 0.5, "keys_to": 0.5}, "keys_from must be below keys_to"),
        ({"phrase": "("}, "phrase: not a regular expression"),
        ({"without_phrase": "("}, "without_phrase: not a regular expression"),
        ({"min_area": 2.0}, "less than or equal to 1"),
        ({"areas": 1}, "Extra inputs"),
    ],
)
def test_choices_that_cannot_be_are_refused(choice, says):
    with pytest.raises(ValidationError, match=says):
        PairChoice(**choice)


WHERE = pa.table(
    {
        "key": ["a", "b", "c", "d"],
        "mask_area": pa.array([0.5] * 4, pa.float32()),
        "scale": pa.array([0.1, 4.0, 5.0, None], pa.float32()),
        "prompt_cut": [True, False, None, False],
        "color_profile": [None, "Display P3", "unusable", "Display P3"],
        "orientation": pa.array([1, 6, 1, 8], pa.int8()),
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ([], [0, 1, 2, 3]),
        ([["scale", "<=", 4]], [0, 1]),
        ([["scale", ">", 0.1]], [1, 2]),
        ([["scale", "==", 0.1]], [0]),
        ([["prompt_cut", "==", False]], [1, 3]),
        ([["prompt_cut", "!=", True]], [1, 2, 3]),
        ([["color_profile", "!=", "unusable"]], [0, 1, 3]),
        ([["color_profile", "==", "Display P3"], ["orientation", ">=", 7]], [3]),
        ([["orientation", "<", 2], ["key", "!=", "a"]], [2]),
    ],
)
def test_conditions_on_any_column_of_the_index(where, rows):
    choice = PairChoice(where=where)
    assert choice.select(WHERE).tolist() == rows
    assert choice.takes_all == (not where)
    assert PairChoice.model_validate_json(choice.model_dump_json()) == choice


@pytest.mark.parametrize(
    "condition",
    [["scale", "<", "x"], ["orientation", "==", 1000], ["scale", "~", 1]],
)
def test_a_condition_that_no_index_can_meet_is_refused(condition):
    with pytest.raises(
        ValueError, match=r"where: expected .* the columns are key, view|where\.0\.1"
    ):
        PairChoice(where=[condition])


KEPT = pa.table(
    {
        "mask_area": pa.array([None] * 7, pa.float32()),
        "task_id": ["9007199254740993", "12", "012", " 1.5e1", "1_2", None, "nan"],
        "nsfw": ["true", "false", None, "1", "true", "no", "true"],
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (["task_id", "==", 9007199254740993], [0]),
        (["task_id", "==", 9007199254740992], []),
        (["task_id", "==", 12], [1, 2]),
        (["task_id", "==", "12"], [1]),
        (["task_id", "<=", 15.0], [1, 2, 3]),
        (["task_id", "!=", 12], [0, 3, 4, 5, 6]),
        (["nsfw", "==", True], [0, 4, 6]),
        (["nsfw", "!=", True], [1, 2, 3, 5]),
    ],
)
def test_kept_text_is_compared_as_what_it_is_compared_with(where, rows):
    choice = PairChoice(where=[where])
    assert choice.select(KEPT).tolist() == rows
    assert choice.select(pa.concat_tables([KEPT.slice(0, 2), KEPT.slice(2)])).tolist() == rows
    choice.check_columns(KEPT.schema, where="layer")


def test_a_column_that_a_layer_lacks_is_refused_where_the_layer_is_known():
    choice = PairChoice(where=[["uid", "==", 1]])
    with pytest.raises(SpecError, match=r"layer: where: .*'uid'.*columns are mask_area, task_id"):
        choice.check_columns(KEPT.schema, where="layer")


def test_a_pair_without_area_or_phrase_meets_what_has_no_bearing_on_it():
    table = pa.table(
        {
            "phrase": ["dog", None, "cat"],
            "mask_area": pa.array([0.1, None, 0.6], pa.float32()),
        }
    )
    for choice, rows in (
        ({"min_area": 0.5}, [1, 2]),
        ({"max_area": 0.5}, [0, 1]),
        ({"phrase": "dog"}, [0]),
        ({"without_phrase": "dog"}, [1, 2]),
        ({"phrase": "^$"}, [1]),
    ):
        assert PairChoice(**choice).select(table).tolist() == rows
