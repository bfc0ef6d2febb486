"""From a sample to views and pairs: numbered, drawn by key and seed, none lost unsaid."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.corpus.members import RejectReason
from pipeline.corpus.text import SampleText
from pipeline.decode.color import UNUSABLE
from pipeline.decode.pairs import MAX_SCALE, count_notes, index_rows, rejects_table
from pipeline.decode.views import Box
from pipeline.spec.fields import LatentsSpec
from pipeline.store.layout import INDEX_SCHEMA, REJECTS_SCHEMA, digest_pairs
from tests.support.decode_here import Sample, build_views

PROMPTS = tuple(f"{word} {{}}." for word in ("a", "one", "the", "some", "any", "each"))


def make_spec(**fields):
    return LatentsSpec(model="m", size=64, **fields)


@pytest.fixture
def sample():
    """128 by 64 px: a mask on the left, one in the middle, one of a single pixel at the right."""
    masks = np.zeros((3, 64, 128), bool)
    masks[0, 8:40, 0:40] = True
    masks[1, 20:50, 48:80] = True
    masks[2, 5, 127] = True
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    return Sample("shard/one", image, "f" * 64, SampleText(("red {}", "blue", "dot")), tuple(masks))


def test_one_view_holds_every_phrase_that_it_shows(sample):
    views, rejects = build_views(sample, make_spec(crop="center"))
    assert len(views) == 1
    view = views[0]
    assert (view.number, view.flipped, view.box) == (0, False, Box(32, 0, 96, 64))
    np.testing.assert_array_equal(view.image, sample.image[:, 32:96])
    assert [pair.phrase for pair in view.pairs] == ["red {}", "blue"]
    assert [pair.prompt for pair in view.pairs] == ["a photo of a red {}.", "a photo of a blue."]
    np.testing.assert_array_equal(view.pairs[1].mask, sample.masks[1][:, 32:96])
    assert len(rejects) == 1
    assert rejects[0].name == "shard/one: dot"
    assert rejects[0].level == "pair"
    assert rejects[0].num_members == 0
    assert rejects[0].reason == RejectReason.OUTSIDE_VIEW
    assert "view 0" in rejects[0].detail


def test_resize_shows_the_whole_image(sample):
    views, _ = build_views(sample, make_spec(crop="resize"))
    assert views[0].box == Box(0, 0, 128, 64)
    assert views[0].pairs[0].mask.mean() == pytest.approx(sample.masks[0].mean(), rel=0.1)


def test_flip_adds_the_mirror_image_after_each_view(sample):
    views, rejects = build_views(sample, make_spec(flip=True))
    assert [(view.number, view.flipped) for view in views] == [(0, False), (1, True)]
    np.testing.assert_array_equal(views[1].image, views[0].image[:, ::-1])
    for plain, mirrored in zip(views[0].pairs, views[1].pairs, strict=True):
        np.testing.assert_array_equal(mirrored.mask, plain.mask[:, ::-1])
    assert len(rejects) == 1  # said once, though in neither


def test_phrase_crops_are_views_of_one_pair(sample):
    views, rejects = build_views(sample, make_spec(crop="phrase", views=2, flip=True))
    numbers = [view.number for view in views]
    assert numbers == sorted(set(numbers))
    assert all(len(view.pairs) == 1 for view in views)
    assert [view.flipped for view in views] == [bool(number % 2) for number in numbers]
    for view in views:
        assert view.box.right - view.box.left == view.box.bottom - view.box.top == 64
        phrase = sample.phrases[view.number // 4]
        assert view.pairs[0].phrase == phrase
        assert view.pairs[0].mask.mean() > (0.05 if phrase != "dot" else 0)
    assert 2 * len(rejects) + len(views) == 3 * 2 * 2
    left = {view.box.left for view in views if view.number // 4 == 0}
    assert len(left) == 2  # two crops, not one twice


def test_draws_depend_on_seed_and_key_alone(sample):
    spec = make_spec(crop="phrase", views=4, prompts=PROMPTS)

    def summarise(sample, spec):
        views, _ = build_views(sample, spec)
        return [(view.box, view.pairs[0].prompt) for view in views]

    first = summarise(sample, spec)
    assert summarise(sample, spec) == first
    other = Sample("other", sample.image, "0", sample.text, sample.masks)
    assert summarise(other, spec) != first
    assert summarise(sample, spec.model_copy(update={"seed": 1})) != first


def test_several_prompts_are_all_drawn(sample):
    spec = make_spec(crop="resize", prompts=PROMPTS)
    drawn = set()
    for number in range(60):
        named = Sample(f"k{number}", sample.image, "0", SampleText(("cat",)), sample.masks[:1])
        drawn |= {pair.prompt for view in build_views(named, spec)[0] for pair in view.pairs}
    assert drawn == {prompt.replace("{}", "cat") for prompt in PROMPTS}


def test_a_sample_that_shows_nothing_has_no_view(sample):
    only = Sample("k", sample.image, "0", SampleText(("dot",)), sample.masks[2:])
    views, rejects = build_views(only, make_spec())
    assert views == []
    assert [reject.name for reject in rejects] == ["k: dot"]


def test_a_views_rows_place_it(sample):
    view = build_views(sample, make_spec())[0][0]
    text_rows = {pair.prompt: 5 + i for i, pair in enumerate(view.pairs)}
    rows = index_rows(view, latent_row=7, text_rows=text_rows, mask_row=4)
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    named = [{name: row.get(name) for name in INDEX_SCHEMA.names} for row in rows]
    assert table.to_pylist() == named
    assert table["mask_row"].to_pylist() == [4, 5]
    assert table["latent_row"].to_pylist() == [7, 7]
    assert table["text_row"].to_pylist() == [5, 6]
    first = rows[0]
    assert first["key"] == "shard/one"
    assert (first["box_left"], first["box_top"]) == (32, 0)
    assert (first["box_right"], first["box_bottom"]) == (96, 64)
    assert (first["source_width"], first["source_height"]) == (128, 64)
    assert first["mask_area"] == view.pairs[0].mask.sum() / 64**2
    assert first["image_sha256"] == "f" * 64


def rows_of(sample, spec, cut_prompts=()):
    views, _ = build_views(sample, spec)
    text_rows = {pair.prompt: 0 for view in views for pair in view.pairs}
    return [
        row
        for number, view in enumerate(views)
        for row in index_rows(
            view, latent_row=number, text_rows=text_rows, mask_row=0, cut_prompts=cut_prompts
        )
    ]


def test_a_thin_mask_is_told_to_need_a_larger_size(sample):
    masks = np.zeros((2, 1000, 1000), bool)
    masks[0, :, 500] = True  # of each 15.6 columns one is sampled, number 484 and 500 among them
    masks[1, :, 485] = True
    image = np.zeros((1000, 1000, 3), np.uint8)
    spec = make_spec()
    views, rejects = build_views(
        Sample("k", image, "0", SampleText(("wire", "pole")), tuple(masks)), spec
    )
    thin = [reject.name for reject in rejects]
    assert [pair.phrase for view in views for pair in view.pairs] == [
        phrase for phrase in ("wire", "pole") if f"k: {phrase}" not in thin
    ]
    assert {reject.reason for reject in rejects} == {RejectReason.TOO_THIN}
    for reject in rejects:
        size = int(reject.detail.split("at size: ")[1].split()[0])
        larger = spec.model_copy(update={"size": size})
        found, _ = build_views(
            Sample("k", image, "0", SampleText(("wire", "pole")), tuple(masks)), larger
        )
        shown = [pair.phrase for view in found for pair in view.pairs]
        assert reject.name.removeprefix("k: ") in shown


def test_equal_phrases_are_numbered_in_their_order(sample):
    masks = (*sample.masks[:2], sample.masks[0])
    twice = replace(sample, text=SampleText(("cat", "dog", "cat")), masks=masks)
    rows = rows_of(twice, make_spec(crop="phrase", views=2, flip=True))
    found = {(row["phrase"], row["view"] // 4): row["instance"] for row in rows}
    assert found == {("cat", 0): 0, ("dog", 1): 0, ("cat", 2): 1}
    alone = replace(
        sample, text=SampleText(("cat", "Cat", "cat "))
    )  # other letters are another phrase
    assert {row["instance"] for row in rows_of(alone, make_spec(crop="resize"))} == {0}


def test_rows_tell_how_far_a_view_is_enlarged_or_shrunk(sample):
    assert {row["scale"] for row in rows_of(sample, make_spec(crop="center"))} == {1.0}
    assert {row["scale"] for row in rows_of(sample, make_spec(crop="resize"))} == {1.0}
    small = replace(sample, image=sample.image[:10], masks=tuple(m[:10] for m in sample.masks))
    assert {row["scale"] for row in rows_of(small, make_spec(crop="resize"))} == {6.4}
    spec = make_spec(crop="resize").model_copy(update={"size": 32})
    assert {row["scale"] for row in rows_of(sample, spec)} == {0.5}


def test_notes_count_pairs_views_and_images(sample):
    spec = make_spec(crop="resize", flip=True)
    assert count_notes(rows_of(sample, spec), spec) == {}
    wide = replace(sample, color_profile="Display P3", orientation=6)
    twice = replace(
        sample, key="t", text=SampleText(("blue", "blue", "dot")), color_profile=UNUSABLE
    )
    like = replace(sample, key="s", color_profile="sRGB IEC61966-2.1")
    side = int(64 / MAX_SCALE)
    small, smaller = (
        replace(
            sample, key=f"{n}", image=sample.image[:n], masks=tuple(m[:n] for m in sample.masks)
        )
        for n in (side, side - 1)
    )
    samples = (wide, twice, like, small, smaller)
    rows = [
        row | {"latent_row": (x.key, row["latent_row"])}
        for x in samples
        for row in rows_of(x, spec, {"a photo of a red {}."})
    ]
    pairs = {x.key: sum(row["key"] == x.key for row in rows) for x in samples}
    reds = sum(row["phrase"] == "red {}" for row in rows)
    assert pairs["t"] >= 4
    assert count_notes(rows, spec) == {
        "cut_prompts": reds,
        "repeated_phrases": sum(row["phrase"] == "blue" and row["key"] == "t" for row in rows),
        "enlarged_views": 2,
        "turned_images": 1,
        "profiled_images": 1,
        "unusable_profiles": 1,
    }
    unturned = spec.model_copy(update={"orientation": "ignore"})
    assert "turned_images" not in count_notes(rows, unturned)


def test_rejects_make_a_table(sample):
    rejects = build_views(sample, make_spec())[1]
    table = rejects_table(rejects)
    assert table.schema == rejects_table([]).schema == REJECTS_SCHEMA
    assert table["name"].to_pylist() == ["shard/one: dot"]
    assert table["reason"].to_pylist() == [str(RejectReason.OUTSIDE_VIEW)]


def test_a_digest_tells_any_two_indexes_apart(sample):
    view = build_views(sample, make_spec())[0][0]
    text_rows = dict.fromkeys((pair.prompt for pair in view.pairs), 0)
    rows = index_rows(view, latent_row=0, text_rows=text_rows, mask_row=0)

    def digest(rows):
        return digest_pairs(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))

    others = [
        [],
        rows[:1],
        rows[::-1],
        [rows[0] | {"key": "shard/two"}, rows[1]],
        [rows[0] | {"view": 1}, rows[1]],
        [rows[0] | {"flipped": True}, rows[1]],
        [rows[0] | {"phrase": "Red {}"}, rows[1]],
        [rows[0] | {"prompt": "red"}, rows[1]],
    ]
    assert len({digest(rows), *map(digest, others)}) == len(others) + 1
    assert digest([rows[0] | {"mask_area": 0.5}, rows[1]]) == digest(rows)  # a value, not a name
