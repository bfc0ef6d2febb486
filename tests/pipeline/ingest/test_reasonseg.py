"""ReasonSeg's shapes are drawn as its authors' reader draws them, in the stored pixels' frame."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.ingest.reasonseg import draw_shape, draw_shapes, list_reasonseg
from pipeline.ingest.sample import IngestError
from pipeline.ingest.writer import encode_members
from tests.support.refer_files import HEIGHT, WIDTH, encode_jpeg

SIZE = (HEIGHT, WIDTH)
OPENCV_SIZE = (40, 56)
OPENCV = json.loads(Path(__file__).with_name("opencv_shapes.json").read_text(encoding="ascii"))


def box(left, top, right, bottom):
    """Corners of a box whose pixels are those up to ``right`` and ``bottom``, both included."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def fill(left, top, right, bottom, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def write_sample(folder, stem, shapes, *, texts=("the dog", "what barks"), image=None, **text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.jpg").write_bytes(image or encode_jpeg(1))
    found = {"text": list(texts), "is_sentence": True, "shapes": shapes}
    data = json.dumps(found, ensure_ascii=False).encode(**text or {"encoding": "utf-8"})
    (folder / f"{stem}.json").write_bytes(data)


def shape(label, points):
    return {"label": label, "points": points, "shape_type": "polygon", "group_id": None}


def build(root, split="val"):
    return [recipe.build() for recipe in list_reasonseg(root, split=split).recipes]


@pytest.mark.parametrize("case", OPENCV)
def test_shapes_equal_what_opencv_drew(case):
    bits = np.frombuffer(bytes.fromhex(case["mask"]), np.uint8)
    expected = np.unpackbits(bits).reshape(OPENCV_SIZE).astype(bool)
    assert np.array_equal(draw_shape(case["points"], OPENCV_SIZE), expected)


def is_inside(x, y, corners):
    """By the even-odd rule, with whole numbers; or on an edge."""
    odd = False
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        cross = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)
        if cross == 0 and min(x0, x1) <= x <= max(x0, x1) and min(y0, y1) <= y <= max(y0, y1):
            return True
        if (y0 > y) != (y1 > y) and (cross > 0) == (y1 > y0):
            odd = not odd
    return odd


def walk(start, end):
    """Bresenham's line as OpenCV's iterator goes, a pixel at a time."""
    (x, y), (x1, y1) = sorted([start, end], key=lambda point: point[0])
    dx, dy, down = x1 - x, abs(y1 - y), 1 if y1 >= y else -1
    longer, shorter = max(dx, dy), min(dx, dy)
    error = longer - 2 * shorter
    for _ in range(longer + 1):
        yield x, y
        aside = error < 0
        error += 2 * longer * aside - 2 * shorter
        x += 1 if dx >= dy else aside
        y += down if dx < dy else down * aside


def draw_slowly(corners, size):
    mask = np.array([[is_inside(x, y, corners) for x in range(size[1])] for y in range(size[0])])
    for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
        for x, y in walk(start, end):
            if 0 <= x < size[1] and 0 <= y < size[0]:
                mask[y, x] = True
    return mask


corner = st.tuples(st.integers(-3, 16), st.integers(-3, 12))


@given(st.lists(corner, min_size=1, max_size=8))
def test_any_shape_is_its_inside_and_its_edges_pixels(corners):
    found = draw_shape([[x, y] for x, y in corners], (10, 14))
    assert np.array_equal(found, draw_slowly(corners, (10, 14)))


def test_all_texts_share_one_mask(tmp_path):
    write_sample(tmp_path / "val", "1_o", [shape("target", box(3, 4, 20, 15.9))])
    (sample,) = build(tmp_path)
    assert [(p.text, dict(p.ids)) for p in sample.phrases] == [
        ("the dog", {"text_id": 0}),
        ("what barks", {"text_id": 1}),
    ]
    for phrase in sample.phrases:
        assert np.array_equal(phrase.mask, fill(3, 4, 20, 15))
    assert not sample.ignore.any()
    assert sample.ids == {"name": "1_o", "is_sentence": 1}
    assert sample.image == encode_jpeg(1)


def test_smaller_shapes_are_drawn_over_larger_ones():
    """In whatever order they are listed: an ignored region in a target, and a target in that."""
    outer, middle, inner = box(0, 0, 40, 30), box(5, 5, 30, 20), box(10, 8, 15, 12)
    shapes = [shape("target", inner), shape("ignore", middle), shape("target", outer)]
    for some in (shapes, shapes[::-1]):
        target, ignore = draw_shapes(some, SIZE)
        assert np.array_equal(ignore, fill(5, 5, 30, 20) & ~fill(10, 8, 15, 12))
        assert np.array_equal(target, fill(0, 0, 40, 30) & ~ignore)


def test_of_equal_areas_the_earlier_is_drawn_last():
    target, ignore = draw_shapes(
        [shape("target", box(0, 0, 9, 9)), shape("ignore", box(5, 0, 14, 9))], SIZE
    )
    assert np.array_equal(target, fill(0, 0, 9, 9))
    assert np.array_equal(ignore, fill(10, 0, 14, 9))


@pytest.mark.parametrize(
    ("label", "is_target", "is_ignored"),
    [
        ("target", True, False),
        ("anything", True, False),
        ("ignore", False, True),
        ("Ignore_1", False, True),
        ("flag", False, False),
        ("FLAG", False, False),
        ("flagpole", True, False),
    ],
)
def test_labels_say_what_a_shape_is(label, is_target, is_ignored):
    target, ignore = draw_shapes([shape(label, box(1, 1, 5, 5))], SIZE)
    assert (target.any(), ignore.any()) == (is_target, is_ignored)


@pytest.mark.parametrize("turn", range(1, 9))
def test_points_are_on_the_upright_image(tmp_path, turn):
    """As OpenCV reads it; the tar's mask, which the writer turns, is where the points are."""
    image = encode_jpeg(1, orientation=turn)
    upright = HEIGHT, WIDTH
    if turn > 4:
        upright = WIDTH, HEIGHT
    write_sample(tmp_path / "val", "a", [shape("x", box(2, 3, 9, 30))], image=image)
    (sample,) = build(tmp_path)
    expected = fill(2, 3, 9, 30, size=upright)
    stored = Image.fromarray(sample.phrases[0].mask.astype(np.uint8))
    stored.getexif()[0x0112] = turn
    assert stored.size == (WIDTH, HEIGHT)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(stored)), expected)
    png = encode_members(sample).files["mask0.png"]
    (tmp_path / "mask.png").write_bytes(png)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")), expected)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_text_may_be_in_windows_1252(tmp_path, encoding):
    shapes = [shape("x", box(1, 1, 5, 5))]
    write_sample(tmp_path / "val", "a", shapes, texts=["the café’s cup"], encoding=encoding)
    assert build(tmp_path)[0].phrases[0].text == "the café’s cup"


def test_images_are_listed_by_name_beside_the_published_count(tmp_path):
    for stem in ("b", "a.b", "a_b", "c"):
        write_sample(tmp_path / "test", stem, [shape("x", box(1, 1, 5, 5))])
    (tmp_path / "test" / "notes.txt").write_text("no sample")
    listing = list_reasonseg(tmp_path, split="test")
    assert (listing.listed, listing.published) == ({"images": 4}, {"images": 779})
    recipes = list(listing.recipes)
    assert [recipe.key for recipe in recipes] == ["a_b-2e7336dc", "a_b", "b", "c"]
    assert [recipe.build().ids["name"] for recipe in recipes] == ["a.b", "a_b", "b", "c"]


@pytest.mark.parametrize(
    "changes",
    [
        {"text": ["what", None]},
        {"shapes": [{"label": "x", "points": [[0, 0], [10**400, 1], [1, 1]]}]},
    ],
)
def test_what_is_no_text_and_no_number_costs_that_image_alone(tmp_path, changes):
    write_sample(tmp_path / "val", "a", [shape("x", box(1, 1, 5, 5))])
    path = tmp_path / "val" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(IngestError, match="bad_annotation"):
        build(tmp_path)


def test_a_missing_image_is_told(tmp_path):
    write_sample(tmp_path / "val", "a", [])
    (tmp_path / "val" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        build(tmp_path)


def test_no_samples_are_an_error(tmp_path):
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"val: expected X\.jpg and X\.json, got no JSON"):
        list_reasonseg(tmp_path, split="val")


@pytest.mark.parametrize(
    "found",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"text": ["a"], "is_sentence": true}',
        '{"text": ["a"], "shapes": []}',
        *(
            json.dumps({"text": ["a"], "is_sentence": True, "shapes": shapes})
            for shapes in (
                "none",
                [{"label": "x"}],
                [shape(None, box(1, 1, 5, 5))],
                [shape("x", [1, 2, 3, 4])],
                [shape("x", [[1, 2, 3]])],
                [shape("x", [[float("nan"), 1], [2, 3], [4, 5]])],
                [shape("x", [[0, 0], [1e9, 1e9]])],
                [shape("x", [[0, 0], [1e6, 1e6]] * 100)],
            )
        ),
    ],
)
def test_a_damaged_annotation_leaves_its_image_out(tmp_path, found):
    write_sample(tmp_path / "val", "a", [])
    (tmp_path / "val" / "a.json").write_text(found)
    with pytest.raises(IngestError) as caught:
        build(tmp_path)
    assert caught.value.reason == "bad_annotation"
