"""Masks of polygons: as skimage and PhraseCut's evaluator draw them, pixel by pixel."""

import hashlib
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.base.raster import draw_polygons
from tests.support.polygons import draw_slowly

# What skimage 0.26's polygon2mask draws in 8 x 9 pixels, and the official evaluator's
# polygons_to_mask with Pillow 13.
DRAWN = {
    "triangle": (
        [[2, 1], [7.4, 3.2], [1.5, 6.6]],
        "......... ..#...... ..###.... ..#####.. ..#####.. ..###.... ..#...... .........",
        "......... ..#...... ..###.... ..######. .#####... .###..... .#....... .........",
    ),
    "square on centres": (
        [[1, 1], [5, 1], [5, 4], [1, 4]],
        "......... .#####... .#####... .#####... .#####... ......... ......... .........",
        "......... .#####... .#####... .#####... .#####... ......... ......... .........",
    ),
    "square between centres": (
        [[1.5, 1.5], [5.5, 1.5], [5.5, 4.5], [1.5, 4.5]],
        "......... ......... ..####... ..####... ..####... ......... ......... .........",
        "......... .#####... .#####... .#####... .#####... ......... ......... .........",
    ),
    "bow tie": (
        [[0, 0], [7, 6], [7, 0], [0, 6]],
        "#......#. ##....##. ###..###. ########. ###..###. ##....##. #......#. .........",
        "#......#. ##....##. ###..###. ########. ###..###. ##....##. #......#. .........",
    ),
    "reaches out": (
        [[-3, 2.2], [12, -1], [5, 20]],
        "........# ...###### ######### ######### ######### ######### ######### #########",
        ".......## ..####### ######### ######### ######### ######### ######### #########",
    ),
    "line": (
        [[1, 1], [6, 6]],
        "......... .#....... ......... ......... ......... ......... ......#.. .........",
        "......... .#....... ..#...... ...#..... ....#.... .....#... ......#.. .........",
    ),
    "point": (
        [[3, 2]],
        "......... ......... ...#..... ......... ......... ......... ......... .........",
        "......... ......... ......... ......... ......... ......... ......... .........",
    ),
    "twice round": (
        [[1, 1], [6, 1], [6, 6], [1, 6], [1, 1], [6, 1], [6, 6], [1, 6]],
        "......... .#....#.. ......... ......... ......... ......... .#....#.. .........",
        "......... .######.. .#....#.. .#....#.. .#....#.. .#....#.. .######.. .........",
    ),
    "nothing": ([], " ".join(["........."] * 8), " ".join(["........."] * 8)),
}
# SHA-256 of the packed bits of skimage's masks of 300 random polygons, 40 x 50 pixels each.
SKIMAGE_SHA256 = "b7b86ced3c85575504b887de9d9eae1556e6993b9168a9ce6301840e8a9b495c"


def list_random_polygons(num):
    """Of 1 to 20 points, at whole, half, third and finer coordinates, many of them outside."""
    rng = random.Random(0)
    for _ in range(num):
        unit = rng.choice([1, 2, 3, 1000])
        yield [[round(rng.uniform(-10, 60) * unit) / unit for _ in "xy"]
               for _ in range(rng.randint(1, 20))]  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("rule", ["centre", "official"])
def test_masks_are_those_of_the_fields_own_programs(name, rule):
    polygon, centre, official = DRAWN[name]
    mask = draw_polygons([polygon], (8, 9), rule)
    rows = ["".join(".#"[value] for value in row) for row in mask.astype(int)]
    assert rows == {"centre": centre, "official": official}[rule].split()
    assert mask.dtype == bool


def test_random_polygons_are_skimages_bit_by_bit():
    digest = hashlib.sha256()
    for polygon in list_random_polygons(300):
        digest.update(np.packbits(draw_polygons([polygon], (40, 50))).tobytes())
    assert digest.hexdigest() == SKIMAGE_SHA256


def test_a_pixels_centre_decides():
    rng = random.Random(1)
    for _ in range(60):
        polygon = [[rng.randint(-4, 40) / 2 for _ in "xy"] for _ in range(rng.randint(1, 9))]
        slow = draw_slowly([polygon], (15, 17))
        assert np.array_equal(draw_polygons([polygon], (15, 17)), slow)


def test_the_official_rule_is_pillows_on_whole_numbers():
    for polygon in list_random_polygons(100):
        image = Image.new("1", (50, 40))
        if len(polygon) > 1:
            whole = [(int(x), int(y)) for x, y in polygon]
            ImageDraw.Draw(image).polygon(whole, fill=1, outline=1)
        assert np.array_equal(draw_polygons([polygon], (40, 50), "official"), np.asarray(image))


@pytest.mark.parametrize("rule", ["centre", "official"])
def test_several_polygons_are_their_union(rule):
    polygons = list(list_random_polygons(6))
    union = np.any([draw_polygons([each], (40, 50), rule) for each in polygons], axis=0)
    assert np.array_equal(draw_polygons(polygons, (40, 50), rule), union)
    assert not draw_polygons([], (40, 50), rule).any()


def test_a_polygon_of_very_many_points_is_drawn_in_parts(monkeypatch):
    polygon = [[30 + 25 * np.cos(t), 20 + 18 * np.sin(t)] for t in np.linspace(0, 6.28, 500)]
    whole = draw_polygons([polygon], (40, 60))
    monkeypatch.setattr("pipeline.base.raster._CROSSINGS_AT_ONCE", 300)
    assert np.array_equal(draw_polygons([polygon], (40, 60)), whole)


@pytest.mark.parametrize("rule", ["centre", "official"])
@pytest.mark.parametrize(
    ("polygon", "named"),
    [
        ([[1, 2], [float("nan"), 3]], "finite"),
        ([[1, 2], [float("inf"), 3]], "finite"),
        ([[1, 2], [1e30, 3]], "within"),
        ([1, 2, 3, 4], "list of"),
        ([[1, 2], [3]], "list of"),
        ([["a", "b"]], "list of"),
        (None, "list of"),
    ],
)
def test_what_is_no_polygon_is_refused(polygon, named, rule):
    with pytest.raises(ValueError, match=named):
        draw_polygons([polygon], (8, 9), rule)
