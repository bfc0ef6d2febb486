"""What is said of peculiarities that are kept or converted."""

import pytest

from pipeline.corpus.notes import _SAYINGS, describe_notes
from pipeline.store.layout import INDEX_SCHEMA


def test_a_note_is_a_line_in_words_and_none_of_nothing():
    notes = {"cut_prompts": 12, "turned_images": 1, "enlarged_views": 0, "of_a_later_version": 3}
    cut, turned, later = describe_notes(notes)
    assert cut.startswith("12 pairs with a prompt that the tokenizer cut")
    assert turned.startswith("1 image turned upright by EXIF")
    assert later == "3 of_a_later_version"


@pytest.mark.parametrize("name", sorted(_SAYINGS))
def test_each_note_names_a_column_to_find_it_by(name):
    (line,) = describe_notes({name: 1})
    assert any(f"column {column}" in line for column in INDEX_SCHEMA.names)
