"""What is said of peculiarities that are kept or converted."""

from pipeline.corpus.notes import describe_notes


def test_a_note_is_a_line_in_words_and_none_of_nothing():
    notes = {"cut_prompts": 12, "turned_images": 1, "enlarged_views": 0, "of_a_later_version": 3}
    assert describe_notes(notes) == [
        "12 prompts cut at the text encoder's length: what follows was not read",
        "1 image turned as EXIF tells",
        "3 of_a_later_version",
    ]
