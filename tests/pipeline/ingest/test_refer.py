"""RefCOCO's references become pairs with the masks that their annotations draw, joined by ids."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ingest.refer import PUBLISHED, list_refer
from pipeline.ingest.sample import IngestError
from tests.support.refer_files import (
    CROWD,
    IMAGES,
    OUTLINES,
    REFS,
    TWO_BOXES,
    encode_jpeg,
    fill,
    image_entry,
    outline,
    ref,
    sentence,
    write_refer,
)


def list_split(root, split="val", **options):
    chosen = {"dataset": "refcoco", "split_by": "unc", "images": root / "images"} | options
    return list_refer([root], split=split, **chosen)


def build_all(listing):
    return {recipe.key: recipe.build() for recipe in listing.recipes}


def describe(sample):
    ids = [tuple(phrase.ids.values()) for phrase in sample.phrases]
    return [(phrase.text, *key) for phrase, key in zip(sample.phrases, ids, strict=True)]


@pytest.fixture
def root(tmp_path):
    write_refer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_every_sentence_is_a_pair_with_its_objects_mask(tmp_path, protocol):
    write_refer(tmp_path, protocol=protocol)
    listing = list_split(tmp_path)
    samples = build_all(listing)
    assert list(samples) == ["000000000005", "000000000007"]  # by image id
    crowd, boxes = samples.values()
    assert boxes.image == encode_jpeg(7)
    assert boxes.ids == {"image_id": 7}
    assert describe(boxes) == [  # equal sentences stay
        ("two boxes", 31, "1", 10),
        ("two boxes", 31, "1", 11),
        ("corner", 29, "2", 13),
    ]
    first, second, corner = (phrase.mask for phrase in boxes.phrases)
    assert np.array_equal(first, fill(*TWO_BOXES))
    assert second is first
    assert np.array_equal(corner, fill((40, 30, 60, 40)))
    assert describe(crowd) == [("the crowd", 30, "3", 12), ("run lengths", 27, "5", 16)]
    assert np.array_equal(crowd.phrases[0].mask, CROWD)
    assert np.array_equal(crowd.phrases[1].mask, fill((5, 5, 9, 9)))
    assert listing.listed == {"images": 2, "refs": 5, "pairs": 7}


def test_masks_are_the_union_that_pycocotools_draws(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(0)
    outlines, expected = [], []
    for number in range(30):
        sizes = random.integers(3, 9, random.integers(1, 4))
        polygons = [(random.random(2 * size) * 70 - 5).round(2).tolist() for size in sizes]
        outlines.append(outline(number, 7, polygons))
        codes = coco.frPyObjects(polygons, 40, 60)
        expected.append(coco.decode(coco.merge(codes)).astype(bool))
    refs = [ref(n, 7, n, "val", sentence(n, f"object {n}")) for n in range(30)]
    write_refer(tmp_path, refs=refs, outlines=outlines)
    (sample,) = build_all(list_split(tmp_path)).values()
    for phrase, mask in zip(sample.phrases, expected, strict=True):
        assert np.array_equal(phrase.mask, mask), phrase.text


def test_a_bad_outline_costs_its_own_sentences_alone(root):
    sample = build_all(list_split(root))["000000000005"]
    assert [(phrase, reason) for phrase, reason, _ in sample.rejects] == [
        ("bad", "bad_polygon"),
        ("polygon", "bad_polygon"),
    ]


def test_references_that_lead_nowhere_are_told(root):
    (sample,) = build_all(list_split(root, "testB")).values()
    assert not sample.phrases[0].mask.any()  # an empty outline: the writer drops and counts it
    assert [(phrase, reason) for phrase, reason, _ in sample.rejects] == [
        ("of another image", "other_image"),
        ("of no annotation", "no_annotation"),
    ]
    assert "annotation 8 is of image 99" in sample.rejects[0][2]


def test_raw_is_the_text_as_it_was_typed(root):
    boxes = build_all(list_split(root, text="raw"))["000000000007"]
    assert [phrase.text for phrase in boxes.phrases] == ["Two BOXES!", "two boxes", "corner"]


def test_train2017s_names_serve(root):
    for entry in IMAGES:
        name = root / "images" / entry["file_name"]
        name.rename(name.with_name(f"{entry['id']:012d}.jpg"))
    assert build_all(list_split(root))["000000000007"].image == encode_jpeg(7)


def test_a_missing_image_names_both_files(root):
    (root / "images" / IMAGES[1]["file_name"]).unlink()
    recipes = {recipe.key: recipe for recipe in list_split(root).recipes}
    with pytest.raises(FileNotFoundError, match=r"0+7\.jpg neither: .*COCO_train2014_0+7\.jpg"):
        recipes["000000000007"].build()
    recipes["000000000005"].build()


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([], "no_annotation"),
        ([image_entry(7, size=(0, 60))], "bad_annotation"),
        ([image_entry(7, size=(10**6, 10**6))], "size"),
        ([{"id": 7}], "bad_annotation"),
    ],
)
def test_an_image_of_a_bad_entry_is_left_out(tmp_path, images, reason):
    write_refer(tmp_path, refs=REFS[:1])
    instances = {"images": images, "annotations": OUTLINES}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (recipe,) = list_split(tmp_path).recipes
    with pytest.raises(IngestError) as caught:
        recipe.build()
    assert caught.value.reason == reason


def test_no_file_outside_the_folder_is_read(tmp_path):
    write_refer(tmp_path, refs=REFS[:1])
    (tmp_path / "secret.jpg").write_bytes(encode_jpeg(1))
    images = [image_entry(7) | {"file_name": "../secret.jpg"}]
    instances = {"images": images, "annotations": OUTLINES}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (recipe,) = list_split(tmp_path).recipes
    with pytest.raises(FileNotFoundError, match=r"images/secret\.jpg"):
        recipe.build()


def test_the_folder_may_be_the_one_of_all_datasets(tmp_path):
    write_refer(tmp_path / "refcoco")
    listing = list_split(tmp_path, images=tmp_path / "refcoco" / "images")
    assert len(list(listing.recipes)) == 2


def test_test_is_both_halves_and_says_so(root):
    both = list_split(root, "test")
    assert both.listed == {"images": 1, "refs": 4, "pairs": 4}
    assert both.published == {"refs": 3785, "images": 1500, "pairs": 10_752}
    assert any("testA and testB" in note for note in both.notes)
    assert list_split(root, "testA").listed["refs"] == 1
    one = list_split(root, "testA")
    assert not any("testA and testB" in note for note in one.notes)
    assert one.published == {"refs": 1975, "images": 750, "pairs": 5657}


def test_refcocogs_test_is_its_own(tmp_path):
    write_refer(tmp_path, refs=[REFS[0] | {"split": "test"}], split_by="umd")
    listing = list_split(tmp_path, "test", dataset="refcocog", split_by="umd")
    assert listing.published == {"refs": 5023, "images": 2600, "pairs": 9602}
    assert not listing.notes


def test_images_in_two_splits_are_counted(tmp_path):
    refs = [REFS[0], REFS[2] | {"split": "train"}, REFS[1]]
    write_refer(tmp_path, refs=refs, split_by="google")
    listing = list_split(tmp_path, dataset="refcocog", split_by="google")
    assert listing.notes == ("1 of the 2 images are in other splits, too",)
    assert listing.published == {"refs": 5000, "images": 4650}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "testC"}, r"--split testC: .*splits in .*refs\(unc\)\.p: testA, testB, val"),
        ({"split_by": "umd"}, "--split-by umd: refcoco is split by unc or google"),
        ({"dataset": "refcoco+", "split_by": "google"}, r"refcoco\+ is split by unc"),
        ({"dataset": "refcocog"}, "--split-by unc: refcocog is split by umd or google"),
    ],
)
def test_an_unknown_split_names_those_there_are(root, options, message):
    with pytest.raises(ValueError, match=message):
        list_split(root, **{"split": "val", **options})


def test_no_folder_of_images_is_an_error_at_once(root):
    with pytest.raises(ValueError, match=r"--images: expected a folder, got .*/none"):
        list_split(root, images=root / "none")


def test_a_folder_without_the_files_says_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected refs\(unc\)\.p and instances\.json"):
        list_split(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ref_id": "1"}, "reference 1: ref_id: .*integer"),
        ({"image_id": 7.5}, "reference 1: image_id"),
        ({"image_id": True}, "reference 1: image_id"),
        ({"sentences": None}, "reference 1: sentences"),
        ({"sentences": [{"sent_id": 1, "sent": 5}]}, r"reference 1: sentences\.0\.sent: .*got 5"),
        ({"ann_id": [1, "2"]}, "reference 1: ann_id"),
    ],
)
def test_entries_of_another_form_are_refused(tmp_path, entry, message):
    write_refer(tmp_path, refs=[REFS[0], REFS[1] | entry])
    with pytest.raises(ValueError, match=message):
        list_split(tmp_path)


def test_one_list_in_many_places_is_refused(tmp_path):
    sentences = [sentence(number, "laughs") for number in range(1000)]
    refs = [ref(number, number, 1, "val") | {"sentences": sentences} for number in range(1000)]
    write_refer(tmp_path, refs=refs)
    with pytest.raises(ValueError, match="more sentences than its bytes can hold"):
        list_split(tmp_path)


def test_instances_of_another_form_are_refused(root):
    (root / "instances.json").write_text("[]")
    with pytest.raises(ValueError, match="expected COCO's images and annotations"):
        list_split(root)
    (root / "instances.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances\.json: is no JSON"):
        list_split(root)


SPLITS_ON_THE_HUB = {"val": "validation", "testA": "test"}


def write_parquet(path, refs, rename=SPLITS_ON_THE_HUB):
    images, outlines = ({entry["id"]: entry for entry in table} for table in (IMAGES, OUTLINES))
    rows = [
        {
            **entry,
            "split": rename.get(entry["split"], entry["split"]),
            "raw_anns": json.dumps(outlines[entry["ann_id"]]),
            "raw_image_info": json.dumps(images[entry["image_id"]]),
            "raw_sentences": json.dumps(entry["sentences"]),
            "image_path": f"coco/train2014/{images[entry['image_id']]['file_name']}",
            "captions": [s["sent"] for s in entry["sentences"]],
        }
        for entry in refs
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("rename", [SPLITS_ON_THE_HUB, {}])
@pytest.mark.parametrize("split", ["val", "testA", "testB", "test"])
def test_parquet_files_give_what_the_pickle_gives(tmp_path, split, rename):
    refs = REFS[:7]
    images = write_refer(tmp_path, refs=refs)
    files = [
        write_parquet(tmp_path / "a.parquet", refs[:2], rename),
        write_parquet(tmp_path / "b.parquet", refs[2:], rename),
    ]
    options = {"dataset": "refcoco", "split_by": "unc", "split": split, "images": images}
    found, expected = (list_refer(sources, **options) for sources in (files, [tmp_path]))
    assert (found.listed, found.published) == (expected.listed, expected.published)
    for (key, sample), (other_key, other) in zip(
        build_all(found).items(), build_all(expected).items(), strict=True
    ):
        assert key == other_key
        assert describe(sample) == describe(other)
        assert (sample.image, sample.ids, sample.rejects) == (other.image, other.ids, other.rejects)
        for phrase, other_phrase in zip(sample.phrases, other.phrases, strict=True):
            assert np.array_equal(phrase.mask, other_phrase.mask)


def test_refcocogs_test_of_the_hub_is_its_test(tmp_path):
    refs = [REFS[0] | {"split": "test"}]
    file = write_parquet(tmp_path / "a.parquet", refs)
    options = {"dataset": "refcocog", "split_by": "umd", "images": tmp_path}
    assert list_refer([file], split="test", **options).listed["refs"] == 1


def test_flat_segmentations_are_refused_with_the_reason(tmp_path):
    row = {"question_id": "1", "segmentation": [1.0, 2.0], "answer": ["a dog"], "bbox": [0.0]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "val.parquet")
    options = {"dataset": "refcoco", "split_by": "unc", "split": "val", "images": tmp_path}
    with pytest.raises(ValueError, match=r"one flat list .*polygons of an object cannot be told"):
        list_refer([tmp_path / "val.parquet"], **options)


def test_other_parquet_files_and_mixed_sources_are_refused(root):
    pq.write_table(pa.table({"ref_id": [1]}), root / "other.parquet")
    file = root / "other.parquet"
    options = {"dataset": "refcoco", "split_by": "unc", "split": "val", "images": root}
    with pytest.raises(ValueError, match="got none named ann_id, image_id"):
        list_refer([file], **options)
    with pytest.raises(ValueError, match="one folder, or parquet files alone"):
        list_refer([file, root], **options)
    with pytest.raises(ValueError, match="split by unc and umd"):
        list_refer([file], **options | {"split_by": "google"})


def test_a_row_that_is_no_json_is_named(root):
    table = pa.Table.from_pylist([REFS[0] | {"raw_anns": "{", "raw_image_info": "{}"}])
    pq.write_table(table, root / "damaged.parquet")
    options = {"dataset": "refcoco", "split_by": "unc", "split": "val", "images": root}
    with pytest.raises(ValueError, match=r"damaged\.parquet: row 0: JSONDecodeError"):
        list_refer([root / "damaged.parquet"], **options)


def test_published_counts_add_up_to_the_datasets():
    sums = {}
    for (dataset, split_by, _), counts in PUBLISHED.items():
        for place, count in enumerate(counts):
            sums[dataset, split_by, place] = sums.get((dataset, split_by, place), 0) + count
    # Refs, images and sentences as the datasets' papers and refer's README give them in all.
    assert [sums["refcoco", "unc", i] for i in range(3)] == [50_000, 19_994, 142_210]
    assert [sums["refcoco+", "unc", i] for i in range(3)] == [49_856, 19_992, 141_564]
    assert [sums["refcocog", "umd", i] for i in range(3)] == [49_822, 25_799, 95_010]


def test_the_protocols_page_gives_the_published_counts():
    page = (Path(__file__).parents[3] / "docs" / "howto" / "protocols.md").read_text("utf-8")
    for (dataset, split_by, split), (_, *counts) in PUBLISHED.items():
        (row,) = (line for line in page.splitlines() if f"| `{dataset}` | `{split_by}` |" in line)
        assert f"`{split}` " + " / ".join(f"{count:,}" for count in counts) in row
