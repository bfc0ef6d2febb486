"""COCO's instances files: classes as phrases, masks as pycocotools draws them, and what is off."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.ingest.coco import MAX_PIXELS, list_coco
from pipeline.ingest.run import run_ingest
from pipeline.ingest.sample import IngestError
from tests.pipeline.ingest.test_labels import read_mask, read_tars
from tests.support.run_lengths import count_runs

CASES = json.loads(Path(__file__).with_name("coco_masks.json").read_text(encoding="utf-8"))
CATEGORIES = [
    {"id": 90, "name": "stop_sign", "supercategory": "outdoor"},
    {"id": 3, "name": "orange_(fruit)", "supercategory": "food"},
]
HEIGHT, WIDTH = 20, 30


def square(x, y, size=5):
    """A polygon on whole pixels, which COCO draws as the pixels from x to x + size - 1."""
    return [float(n) for n in (x, y, x + size, y, x + size, y + size, x, y + size)]


def draw_squares(*corners, size=5):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for x, y in corners:
        mask[y : y + size, x : x + size] = True
    return mask


class Instances:
    """Writes an instances file and its photographs."""

    def __init__(self, folder):
        self.folder = folder
        self.file = folder / "instances_small.json"
        self.images, self.annotations, self.categories = [], [], list(CATEGORIES)

    def add_image(self, number, *, name=None, size=(HEIGHT, WIDTH), **more):
        name = name or f"COCO_{number}.jpg"
        path = self.folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        jpeg = io.BytesIO()
        Image.new("RGB", size[::-1], (9, 99, 200)).save(jpeg, "JPEG")
        path.write_bytes(jpeg.getvalue())
        about = {"id": number, "file_name": name, "height": size[0], "width": size[1]}
        self.images.append({**about, "license": 1, **more})
        return path

    def add(self, image_id, category_id, segmentation, **more):
        about = {"id": len(self.annotations), "image_id": image_id, "category_id": category_id}
        self.annotations.append(
            {**about, "segmentation": segmentation, "bbox": [0, 0, 1, 1], **more}
        )

    def list(self, **options):
        document = {name: getattr(self, name) for name in ("images", "annotations", "categories")}
        self.file.write_text(json.dumps({"info": {"year": 2017}, **document}))
        return list_coco(self.file, self.folder / "images", **options)

    def build(self, **options):
        return [recipe.build() for recipe in self.list(**options).recipes]


@pytest.fixture
def instances(tmp_path):
    return Instances(tmp_path)


def test_classes_are_phrases_in_the_order_of_categories_with_the_union_of_their_masks(instances):
    path = instances.add_image(7)
    instances.add(7, 3, [square(1, 1)])
    instances.add(7, 90, [square(10, 2), square(12, 4)])  # two parts that overlap
    instances.add(7, 3, [square(20, 10)])
    crowd = draw_squares((0, 14))
    instances.add(7, 3, {"size": [HEIGHT, WIDTH], "counts": count_runs(crowd)}, iscrowd=1)
    (sample,) = instances.build()
    assert sample.image == path.read_bytes()
    assert sample.ids == {"image_id": 7}
    sign, orange = sample.phrases
    assert (sign.text, sign.ids) == ("stop_sign", {"category_id": 90})
    assert np.array_equal(sign.mask, draw_squares((10, 2), (12, 4)))
    assert (orange.text, orange.ids) == ("orange_(fruit)", {"category_id": 3})
    assert np.array_equal(orange.mask, draw_squares((1, 1), (20, 10), (0, 14)))


def test_masks_equal_those_of_pycocotools(instances):
    for number, case in enumerate(CASES):
        instances.add_image(number, size=case["size"])
        instances.add(number, 90, case["polygons"])
        instances.add(number, 3, {"size": case["size"], "counts": case["counts"]})
    samples = instances.build()
    assert len(samples) == len(CASES)
    for sample in samples:
        drawn, coded = sample.phrases
        assert np.array_equal(drawn.mask, coded.mask)


def test_images_come_by_id_and_the_counts_are_told(instances):
    for number in (2000, 31, 5):
        instances.add_image(number)
    instances.add(2000, 3, [square(1, 1)])
    instances.add(2000, 90, [square(1, 1)])
    instances.add(5, 3, [])
    instances.add(5, 3, None)
    instances.add(6, 3, [square(1, 1)])
    instances.add(5, 4, [square(1, 1)])
    listing = instances.list()
    assert [recipe.key for recipe in listing.recipes] == ["000000000005", "000000002000"]
    assert listing.split == "small"
    assert listing.listed == {"images": 2, "pairs": 3, "annotations": 6}
    assert sorted(listing.notes) == [
        "1 images without annotation: left out",
        "2 annotations of an image or a class that is not listed: left out",
        "2 annotations without an outline: they add nothing",
    ]


def test_annotation_without_outline_leaves_the_class_its_others(instances):
    instances.add_image(1)
    instances.add(1, 3, [])
    instances.add(1, 3, [square(1, 1)])
    instances.add(1, 90, [])
    sign, orange = instances.build()[0].phrases
    assert not sign.mask.any()  # which the writer drops and counts
    assert np.array_equal(orange.mask, draw_squares((1, 1)))


def test_lvis_names_images_by_url_and_leaves_out_what_is_not_exhaustively_marked(instances):
    url = "http://images.cocodataset.org/train2017/000000000007.jpg"
    path = instances.add_image(
        7, name="train2017/000000000007.jpg", coco_url=url, not_exhaustive_category_ids=[90]
    )
    del instances.images[0]["file_name"]
    instances.add(7, 3, [square(1, 1)])
    instances.add(7, 90, [square(9, 9)])
    instances.file = instances.folder / "lvis_v1_val.json"
    (sample,) = instances.build(lvis=True)
    assert sample.image == path.read_bytes()
    assert [phrase.text for phrase in sample.phrases] == ["orange"]
    listing = instances.list(lvis=True)
    assert listing.listed["pairs"] == 1
    assert listing.notes == ("1 annotations of classes not exhaustively marked: left out",)
    assert listing.published == {"annotations": 244_707}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("baseball_bat", "baseball bat"),
        ("bow_(decorative_ribbons)", "bow"),
        ("headstall_(for_horses)", "headstall"),
        ("pop_(soda)_can", "pop can"),
        ("T-shirt", "T-shirt"),
    ],
)
def test_lvis_names_lose_remarks_and_underscores(instances, name, expected):
    instances.categories = [{"id": 1, "name": name}]
    instances.add_image(1, coco_url="a/b/COCO_1.jpg", name="b/COCO_1.jpg")
    instances.add(1, 1, [square(1, 1)])
    assert [phrase.text for phrase in instances.build(lvis=True)[0].phrases] == [expected]


def test_two_classes_of_one_name_are_two_phrases(instances):
    instances.categories = [{"id": 1, "name": "bow"}, {"id": 2, "name": "bow"}]
    instances.add_image(1)
    instances.add(1, 2, [square(1, 1)])
    instances.add(1, 1, [square(9, 9)])
    phrases = instances.build()[0].phrases
    assert [(one.text, one.ids["category_id"]) for one in phrases] == [("bow", 1), ("bow", 2)]


def test_bad_annotation_costs_its_class_alone(instances):
    instances.add_image(1)
    instances.add(1, 3, [square(1, 1)])
    instances.add(1, 90, [square(9, 9)])
    instances.add(1, 90, [[1.0, 1.0, 5.0, 5.0]], id=44)
    (sample,) = instances.build()
    assert [phrase.text for phrase in sample.phrases] == ["orange_(fruit)"]
    ((phrase, reason, detail),) = sample.rejects
    assert (phrase, reason) == ("stop_sign", "bad_polygon")
    assert detail == "annotation 44: expected x and y of 3 points or more, got 4 numbers"


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([square(1, 1)[:-1]], "bad_polygon"),
        (square(1, 1), "bad_polygon"),
        ([["1"] * 6], "bad_polygon"),
        ([[1, 2, 3, 4, 5, 10**400]], "bad_polygon"),
        ({"size": [WIDTH, HEIGHT], "counts": [600]}, "size"),
        ({"size": [HEIGHT, WIDTH], "counts": [599]}, "bad_rle"),
        ("square", "bad_polygon"),
    ],
)
def test_each_bad_outline_is_a_reject_with_its_reason(instances, segmentation, reason):
    instances.add_image(1)
    instances.add(1, 3, segmentation)
    (sample,) = instances.build()
    assert sample.phrases == ()
    assert [reject[:2] for reject in sample.rejects] == [("orange_(fruit)", reason)]


@pytest.mark.parametrize(
    "size", [(None, 30), (0, 30), (-20, -30), (20.0, 30), (MAX_PIXELS, 2), (2**33,) * 2]
)
def test_size_that_cannot_be_is_a_reject(instances, size):
    instances.add_image(1)
    instances.images[0].update(height=size[0], width=size[1])
    instances.add(1, 3, [square(1, 1)])
    assert [reject[1] for reject in instances.build()[0].rejects] == ["size"]


def test_missing_photograph_is_told_by_its_path(instances):
    instances.add_image(1).unlink()
    instances.add(1, 3, [square(1, 1)])
    with pytest.raises(FileNotFoundError, match=r"images/COCO_1\.jpg"):
        instances.build()


@pytest.mark.parametrize(
    "name",
    ["../secret.jpg", "/etc/passwd", "", ".", "a/../../b.jpg", "a\0b", "\ud800", "x" * 300, None],
)
def test_no_file_outside_the_folder_is_read(instances, name):
    instances.add_image(1)
    instances.images[0]["file_name"] = name
    if name is None:
        del instances.images[0]["file_name"]
    instances.add(1, 3, [square(1, 1)])
    with pytest.raises(IngestError) as caught:
        instances.build()
    assert caught.value.reason == "bad_path"


def test_names_of_windows_and_texts_as_ids_are_understood(instances):
    instances.add_image("a.b/1", name="part one/x.jpg")
    instances.images[0]["file_name"] = "part one\\x.jpg"
    instances.categories = [{"id": "cat", "name": "cat"}]
    instances.add("a.b/1", "cat", [square(1, 1)])
    (recipe,) = instances.list().recipes
    assert recipe.key == "a_b__1-" + hashlib.sha256(b"a.b/1").hexdigest()[:8]
    assert recipe.build().ids == {"image_id": "a.b/1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id": 1}', "expected JSON, whole"),
        ("[" * 100_000, "expected JSON, whole"),
        ("[]", "expected a list of images"),
        ('{"images": [], "annotations": [{}]}', "expected a list of images"),
        ('{"images": [{"id": 1}], "annotations": {}}', "expected a list of annotations"),
        (
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}',
            "category_id",
        ),
        ('{"images": [{"id": [1]}], "annotations": []}', "images: expected id"),
        ('{"images": [7]}', "images: expected id"),
    ],
)
def test_other_documents_are_refused(tmp_path, text, message):
    file = tmp_path / "captions.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        list_coco(file, tmp_path)


@pytest.mark.parametrize("what", ["images", "categories"])
def test_ids_given_twice_are_refused(instances, what):
    instances.add_image(1)
    instances.add(1, 3, [square(1, 1)])
    getattr(instances, what).append(getattr(instances, what)[0])
    with pytest.raises(ValueError, match="ids of their own"):
        instances.list()


def test_tars_hold_what_is_whole_and_the_rest_is_counted(instances):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = instances.add_image(1)
    Image.new("RGB", (WIDTH, HEIGHT)).save(turned, exif=exif)
    instances.add(1, 90, [square(2, 3)])
    instances.add(1, 90, {"size": [HEIGHT, WIDTH], "counts": [580, 20]}, iscrowd=1)
    instances.add(1, 3, [square(2, 3)[:4]])
    instances.add_image(2)
    instances.images[1]["height"] += 1  # annotated on another size
    instances.add(2, 3, [square(1, 1)])
    instances.add_image(3).unlink()
    instances.add(3, 3, [square(1, 1)])
    instances.add_image(4)
    instances.add(4, 3, [])
    out = instances.folder / "out"
    done = run_ingest(instances.list(), str(out), arguments={}, shard_bytes=1 << 20)
    assert (done.images, done.pairs) == (1, 1)
    assert done.rejects == {
        "bad_polygon": 1,
        "size": 1,
        "missing_file": 1,
        "empty_mask": 1,
        "no_phrase": 1,
    }
    members = read_tars(out)
    name = "000000000001"
    assert members[f"{name}.jpg"] == turned.read_bytes()
    assert json.loads(members[f"{name}.json"]) == {
        "phrases": ["stop_sign"],
        "image_id": 1,
        "category_id": [90],
    }
    mask = draw_squares((2, 3))
    mask[:, -1] = True
    assert np.array_equal(read_mask(members[f"{name}.mask0.png"]), np.rot90(mask, -1))
