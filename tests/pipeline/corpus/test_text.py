"""What a sample's text says: phrases, a caption, negatives, kept values; or why it is refused."""

import json

import pytest

from pipeline.corpus.text import CAPTION_BYTES, BadTextError, SampleText, parse_text


def parse(document=None, caption=None, **options):
    if document is not None and not isinstance(document, bytes):
        document = json.dumps(document).encode()
    return parse_text(document, caption, max_phrases=1000, max_phrase_chars=1000, **options)


def test_phrases_come_before_a_caption_and_a_plain_one_before_the_jsons():
    ours, caption = {"phrases": ["a dog"], "caption": "x"}, {"caption": "from json"}
    assert parse(ours, b"plain").phrases == ("a dog",)
    assert parse(caption, b"plain").phrases == ("plain",)
    assert parse(caption).phrases == ("from json",)
    assert parse() == SampleText()


@pytest.mark.parametrize(
    ("document", "caption", "num"),
    [
        (None, None, 0),
        (None, b"a", 0),
        (None, b" ", 0),  # read, and blank
        ({"phrases": ["a"]}, None, 0),
        ({"phrases": ["a"]}, b"a", 1),
        ({"caption": "a"}, None, 0),
        ({"caption": "a"}, b"a", 1),
        ({"caption": None}, None, 1),
        ({"caption": 5}, None, 1),
        ({"image": {}, "annotations": []}, None, 1),
        ([{"bbox": [1, 2, 3, 4]}], None, 1),
        (b"null", b"a", 1),
        (b"", b"a", 1),  # cannot be read, beside a caption
        ({"negatives": ["b"]}, b"a", 0),
    ],
)
def test_a_text_of_which_nothing_is_read_is_set_aside(document, caption, num):
    assert parse(document, caption).num_set_aside == num


@pytest.mark.parametrize(
    ("said", "caption", "notes"),
    [
        (b" A  bus\non\x00the\x85road\t", "A bus on the\ufffdroad", 1),
        ("a\u2028b\u3000c\ud800".encode("utf-8", "surrogatepass"), "a b c\ufffd\ufffd\ufffd", 1),
        (b"\xef\xbb\xbfcat", "cat", ()),
        ("Straße".encode("utf-16"), "Straße", ()),
        (b"caf\xe9", "caf\ufffd", 1),
        (b"\xff\xfe", "", ()),
        (b"x" * 5000, "x" * 1000, 2),
        (b"x" * 999 + b" y", "x" * 999, 2),
        (b"x" * 1000, "x" * 1000, ()),
    ],
)
def test_a_caption_is_brought_into_one_line_and_never_refused(said, caption, notes):
    expected = {1: ("recoded_captions",), 2: ("cut_captions",)}.get(notes or 0, ())
    found = parse(None, said)
    assert (found.phrases, found.notes) == ((caption,) if caption else (), expected)


def test_a_caption_of_which_the_start_is_read_is_cut_between_characters():
    assert parse(None, ("x" + "€" * 30000).encode()[:CAPTION_BYTES]).notes == ("cut_captions",)


def test_a_json_that_cannot_be_read_is_told_beside_a_caption_and_refused_alone():
    assert parse(b'{"phrases": ["a"', b"b") == SampleText(
        ("b",), set_aside=("json",), notes=("unread_json",)
    )
    with pytest.raises(BadTextError, match="JSONDecodeError"):
        parse(b'{"phrases": ["a"')


def test_a_captions_lone_surrogate_in_a_json_is_a_blank():
    assert parse(b'{"caption": "a\\ud800b"}').phrases == ("a b",)


def test_negatives_go_with_phrases_of_which_there_may_then_be_none():
    assert parse({"phrases": ["a"], "negatives": [" b "]}).negatives == ("b",)
    alone = parse({"phrases": [], "negatives": ["b"]})
    assert (alone.phrases, alone.negatives) == ((), ("b",))
    assert parse({"negatives": 5, "caption": "x"}).negatives == ()  # another producer's key
    beside = parse({"negatives": ["b", "caf\u00e9", "Cafe\u0301 ", "b"]}, b"a")
    assert (beside.phrases, beside.negatives) == (("a",), ("b", "caf\u00e9"))
    with pytest.raises(BadTextError, match="an empty list"):
        parse({"phrases": [], "negatives": []})


def test_values_are_kept_as_the_json_spells_them():
    text = b"""{"phrases": ["a", "b"], "uid": 12345678901234567890123, "score": 0.10, "nan": NaN,
        "task_id": ["1__2", null], "three": [1, 2.50, {"x": [true]}], "word": "caf\\u00e9",
        "none": null, "line": "a\\nb\\ud800"}"""
    names = ["uid", "score", "nan", "task_id", "three", "word", "none", "line", "missing"]
    found = parse(text, keep_json=names)
    first = [found.find_kept(name, 0) for name in names]
    three = '[1, 2.50, {"x": [true]}]'
    uid, score = "12345678901234567890123", "0.10"
    assert first == [uid, score, "NaN", "1__2", three, "café", None, r"a\nb\ud800", None]
    assert [found.find_kept("task_id", i) for i in (1, None)] == [None, None]
    assert found.find_kept("uid", None) == uid  # of the image, so of a negative too
