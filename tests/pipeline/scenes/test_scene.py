"""The demo corpus: what phrases mean, what masks show, and the bytes of the tars."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.scenes import scene as scenes
from pipeline.scenes.drawing import (
    COLOURS,
    SHAPES,
    TEXTURES,
    SceneObject,
    draw_background,
    draw_object,
    paste_patch,
)
from pipeline.scenes.looks import STANDARD
from pipeline.scenes.phrases import choose_phrases, list_phrases
from pipeline.scenes.scene import MIN_MASK_FRACTION, draw_scene, list_words, write_corpus

NUM_SCENES = 150


@pytest.fixture(scope="module")
def drawn():
    return [draw_scene(seed=0, split="train", index=index) for index in range(NUM_SCENES)]


def _object(description, *, x=0.5, y=0.5, radius=0.2):
    size, texture, colour, shape = description.split()
    return SceneObject(shape, colour, texture, size, x, y, radius)


def test_a_phrase_is_true_of_every_object_it_describes():
    phrases = list_phrases(
        [
            _object("large plain red circle", x=0.2),
            _object("small plain red circle", x=0.8),
            _object("small striped red square", y=0.8),
        ]
    )
    assert phrases["circle"] == phrases["red circle"] == phrases["plain shape"] == {0, 1}
    assert phrases["red shape"] == {0, 1, 2}
    assert phrases["small red shape"] == {1, 2}
    assert phrases["small striped red square"] == {2}
    assert "red square" in phrases
    assert "blue circle" not in phrases
    assert "shape" not in phrases


def test_places_name_the_outermost_and_only_where_it_is_clear():
    objects = [
        _object("large plain red square", x=0.20, y=0.50),
        _object("large plain blue square", x=0.40, y=0.52),
        _object("large plain blue square", x=0.50, y=0.90),
        _object("large plain green star", x=0.05, y=0.05),
    ]
    phrases = list_phrases(objects)
    assert phrases["the left square"] == {0}  # the star further left is no square
    assert phrases["the bottom square"] == {2}
    assert phrases["the top blue square"] == {1}
    assert "the right square" not in phrases  # 0.40 beside 0.50: too close to call
    assert "the top square" not in phrases
    assert "the left star" not in phrases  # there is only one
    assert "the left red square" not in phrases


def test_chosen_phrases_are_distinct_and_need_all_their_words():
    objects = [
        _object("large plain red circle", x=0.2),
        _object("large plain red square", x=0.8),
        _object("large plain blue circle", y=0.9),
    ]
    true_of = list_phrases(objects)
    counts = {}
    for seed in range(300):
        chosen = choose_phrases(np.random.default_rng(seed), true_of, len(objects))
        assert 2 <= len(set(chosen)) == len(chosen) <= 5
        for phrase in chosen:
            counts[phrase] = counts.get(phrase, 0) + 1
    # Of one circle's four descriptions, the shortest that tells it from the others comes first.
    assert counts["red circle"] > 2 * counts["plain red circle"]
    assert counts["red circle"] > 2 * counts["large red circle"]


def test_a_scene_depends_on_seed_split_and_index_alone(drawn):
    again = draw_scene(seed=0, split="train", index=7)
    np.testing.assert_array_equal(again.image, drawn[7].image)
    assert again.phrases == drawn[7].phrases
    np.testing.assert_array_equal(np.stack(again.masks), np.stack(drawn[7].masks))
    for other in (
        draw_scene(seed=1, split="train", index=7),
        draw_scene(seed=0, split="val", index=7),
        draw_scene(seed=0, split="train", index=8),
    ):
        assert not np.array_equal(other.image, again.image)


@pytest.mark.parametrize("size_px", [64, 128, 200])
def test_images_and_masks_have_the_size_asked_for(size_px):
    scene = draw_scene(seed=3, split="val", index=0, size_px=size_px)
    assert scene.image.shape == (size_px, size_px, 3)
    assert scene.image.dtype == np.uint8
    assert all(m.shape == (size_px, size_px) and m.dtype == np.bool_ for m in scene.masks)


def test_every_scene_has_phrases_of_known_words_with_visible_masks(drawn):
    known = set(list_words())
    for scene in drawn:
        assert 2 <= len(scene.phrases) == len(scene.masks) <= 5
        assert len(set(scene.phrases)) == len(scene.phrases)
        assert {word for phrase in scene.phrases for word in phrase.split()} <= known
        for mask in scene.masks:
            assert MIN_MASK_FRACTION <= mask.mean() < 0.9


def test_words_hold_the_prompt_templates_and_nothing_twice():
    templates = "a photograph of an image of the cropped good bad photo of one"
    assert set(templates.split()) <= set(list_words())
    assert list(list_words()) == sorted(set(list_words()))
    assert {*SHAPES, *COLOURS, *TEXTURES, "small", "large", "left", "bottom"} <= set(list_words())


def test_a_longer_description_lies_within_a_shorter_one(drawn):
    num_compared = 0
    for scene in drawn:
        masks = dict(zip(scene.phrases, scene.masks, strict=True))
        for phrase, mask in masks.items():
            parts = set(phrase.split()) - {"the"}
            for wider, wider_mask in masks.items():
                is_place = wider.startswith("the ")
                if wider != phrase and not is_place and set(wider.split()) - {"shape"} <= parts:
                    assert not (mask & ~wider_mask).any(), (phrase, wider)
                    num_compared += 1
    assert num_compared > 50


def test_descriptions_that_contradict_each_other_do_not_overlap(drawn):
    num_compared = 0
    for scene in drawn:
        found = list(zip(scene.phrases, scene.masks, strict=True))
        for kind in (SHAPES, COLOURS, TEXTURES, ("small", "large")):
            said = [(set(p.split()) & set(kind), m) for p, m in found]
            for one, one_mask in said:
                for two, two_mask in said:
                    if one and two and one != two:
                        assert not (one_mask & two_mask).any()
                        num_compared += 1
    assert num_compared > 100


def _render(objects):
    rng = np.random.default_rng(0)
    return scenes._render(objects, rng, 128, STANDARD, rng)


def test_a_mask_is_the_union_of_the_visible_parts(monkeypatch):
    objects = [
        _object("large plain red circle", x=0.35),
        _object("large plain red square", x=0.60),
        _object("small plain red circle", x=0.85, y=0.2, radius=0.1),
    ]
    monkeypatch.setattr(
        scenes, "choose_phrases", lambda rng, true_of, num_objects: ("circle", "square")
    )
    scene = _render(objects)
    circles, square = scene.masks
    rows, cols = (np.mgrid[0:128, 0:128] + 0.5) / 128
    large = np.hypot(cols - 0.35, rows - 0.5) < 0.2
    small = np.hypot(cols - 0.85, rows - 0.2) < 0.1
    assert not (circles & square).any()
    assert (large & square).sum() > 200  # the square covers a part of the large circle
    wrong = circles ^ ((large | small) & ~square)
    assert wrong.mean() < 0.004  # the rim's pixels


def test_a_layout_that_hides_too_much_is_rejected():
    objects = [_object("large plain red circle"), _object("large plain blue circle", x=0.53)]
    assert _render(objects) is None


def _draw_green(shape, texture):
    green = SceneObject(shape, "green", texture, "large", 0.5, 0.5, 0.25)
    canvas = np.full((128, 128, 3), 128, dtype=np.float32)
    owner = np.full((128, 128), -1, dtype=np.int8)
    paste_patch(canvas, owner, draw_object(green, size_px=128), number=0)
    return canvas, owner == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_shows_its_colour_covers_its_place_and_bears_its_texture(shape):
    plain, covered = _draw_green(shape, "plain")
    # Areas are alike, but for the ring's hole: within a factor of two or so of the circle's.
    assert 0.4 < covered.sum() / (np.pi * 32**2) < 1.1
    marked = {}
    for texture in TEXTURES:
        canvas, _ = _draw_green(shape, texture)
        red, strongest, blue = canvas[covered].mean(axis=0)
        assert strongest > 1.2 * max(red, blue)
        marked[texture] = np.abs(canvas - plain).max(axis=2) > 40
    assert not marked.pop("plain").any()
    for pattern in marked.values():
        assert not (pattern & ~covered).any()
        assert 0.1 < pattern[covered].mean() < 0.7
    assert (marked["striped"] ^ marked["checkered"])[covered].mean() > 0.2
    assert (marked["striped"] ^ marked["dotted"])[covered].mean() > 0.2


def test_an_object_that_reaches_past_the_edge_is_cut_there():
    canvas = np.zeros((64, 64, 3), dtype=np.float32)
    owner = np.full((64, 64), -1, dtype=np.int8)
    corner = _object("large plain white circle", x=0.0, y=0.0)
    paste_patch(canvas, owner, draw_object(corner, size_px=64), number=4)
    assert 0.9 < (owner == 4).sum() / (np.pi * 12.8**2 / 4) < 1.1
    assert (owner[20:, 20:] == -1).all()


def test_backgrounds_vary_and_are_muted():
    backgrounds = [draw_background(np.random.default_rng(seed), size_px=64) for seed in range(60)]
    for background in backgrounds:
        assert background.shape == (64, 64, 3)
        highest, lowest = background.max(axis=2), background.min(axis=2)
        assert (highest - lowest < 0.62 * highest + 8).all()
    assert np.std([b.mean() for b in backgrounds]) > 15


def test_most_scenes_hold_near_copies():
    num_near = 0
    for seed in range(200):
        objects = None
        rng = np.random.default_rng(seed)
        while objects is None:
            objects = scenes._place_objects(rng, None)
        looks = [(o.shape, o.colour, o.texture, o.size) for o in objects]
        shared = [
            sum(a == b for a, b in zip(one, two, strict=True))
            for one, two in itertools.combinations(looks, 2)
        ]
        num_near += any(num in (2, 3) for num in shared)
    assert num_near > 160


def test_the_tars_are_laid_out_as_webdataset_samples(tmp_path):
    paths = write_corpus(tmp_path / "new", split="val", num_images=5, images_per_tar=2, size_px=64)
    assert [path.name for path in paths] == [f"scenes-val-0000{n}.tar" for n in range(3)]
    assert sorted((tmp_path / "new").iterdir()) == paths
    index = 0
    for path in paths:
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        keys = list(dict.fromkeys(name.split(".")[0] for name in members))
        for key in keys:
            scene = draw_scene(seed=0, split="val", index=index, size_px=64)
            names = [f"{key}.jpg", f"{key}.json"]
            names += [f"{key}.mask{n}.png" for n in range(len(scene.phrases))]
            assert [name for name in members if name.startswith(f"{key}.")] == names
            assert json.loads(members[f"{key}.json"]) == {"phrases": list(scene.phrases)}
            jpeg = Image.open(io.BytesIO(members[f"{key}.jpg"]))
            assert jpeg.format == "JPEG"
            assert np.abs(np.asarray(jpeg, float) - scene.image).mean() < 8
            for name, mask in zip(names[2:], scene.masks, strict=True):
                png = Image.open(io.BytesIO(members[name]))
                assert png.mode == "1"
                np.testing.assert_array_equal(np.asarray(png), mask)
            index += 1
    assert index == 5


def test_a_second_run_writes_the_same_bytes(tmp_path):
    arguments = {"split": "train", "num_images": 4, "images_per_tar": 3, "size_px": 64}
    first = write_corpus(tmp_path / "first", **arguments)
    second = write_corpus(tmp_path / "second", **arguments)
    other = write_corpus(tmp_path / "other", **arguments, seed=1)
    for a, b, c in zip(first, second, other, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert a.read_bytes() != c.read_bytes()
    with tarfile.open(first[0]) as tar:
        assert {(m.mtime, m.uname, m.gname, m.mode, m.uid) for m in tar} == {
            (0, "ldznet", "ldznet", 0o444, 0)
        }


def test_a_run_cut_short_leaves_no_half_tar_and_a_rerun_completes(tmp_path, monkeypatch):
    def draw_two(*, index, **arguments):
        if index == 2:
            raise KeyboardInterrupt
        return draw_scene(index=index, **arguments)

    arguments = {"split": "train", "num_images": 4, "images_per_tar": 4, "size_px": 64}
    with monkeypatch.context() as patched:
        patched.setattr(scenes, "draw_scene", draw_two)
        with pytest.raises(KeyboardInterrupt):
            write_corpus(tmp_path, **arguments)
    assert list(tmp_path.glob("*.tar")) == []
    paths = write_corpus(tmp_path, **arguments)
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed and index must be at least 0, but got -1 and 0"),
        ({"index": -2}, "but got 0 and -2"),
        ({"split": "../up"}, "split must match .* but got '../up'"),
        ({"size_px": 16}, "size_px must be at least 32, but got 16"),
    ],
)
def test_scene_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(**({"seed": 0, "split": "train", "index": 0} | change))


@pytest.mark.parametrize("name", ["num_images", "images_per_tar"])
def test_counts_under_one_are_refused_before_anything_is_written(tmp_path, name):
    counts = {"num_images": 2, "images_per_tar": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but got 0"):
        write_corpus(tmp_path / "none", split="train", **counts)
    assert not (tmp_path / "none").exists()
