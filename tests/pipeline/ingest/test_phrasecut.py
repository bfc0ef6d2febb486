"""PhraseCut's files become samples: every phrase's mask pixel by pixel, every omission counted."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from pipeline.base.yaml import SpecError
from pipeline.ingest.phrasecut import PUBLISHED, VAL_WITH_MINIV, list_phrasecut
from pipeline.ingest.run import run_ingest
from pipeline.ingest.sample import IngestError
from tests.support.phrasecut_files import EXIF, FILE_SIZES, OUTSIDE, SIZES, write_phrasecut
from tests.support.polygons import draw_slowly


def draw_by_pillow(polygons, size):
    mask = np.zeros(size, bool)
    for polygon in polygons:
        image = Image.new("1", size[::-1])
        ImageDraw.Draw(image).polygon([tuple(map(int, p)) for p in polygon], fill=1, outline=1)
        mask |= np.asarray(image)
    return mask


def flatten(task):
    return [polygon for instance in task["Polygons"] for polygon in instance]


def build(recipe):
    try:
        return recipe.build()
    except (IngestError, FileNotFoundError) as error:
        return getattr(error, "reason", "missing_file")


@pytest.fixture
def written(tmp_path):
    return tmp_path, {task["task_id"]: task for task in write_phrasecut(tmp_path)}


@pytest.mark.parametrize(
    ("raster", "draw"), [("centre", draw_slowly), ("official", draw_by_pillow)]
)
def test_masks_are_those_of_an_independent_rasteriser(written, raster, draw):
    root, tasks = written
    seen = []
    for recipe in list_phrasecut(root, split="test", raster=raster).recipes:
        sample = build(recipe)
        for phrase in [] if isinstance(sample, str) else sample.phrases:
            task = tasks[phrase.ids["task_id"]]
            width, height = SIZES[task["image_id"]]
            assert phrase.text == task["phrase"]
            assert np.array_equal(phrase.mask, draw(flatten(task), (height, width))), task
            seen.append(phrase.ids["task_id"])
    # By image id, and of an image in the file's order.
    assert seen == ["11__2", "11__1", "12__5", "13__1", "16__1", "16__2", "16__4", "17__1"]


def test_what_is_left_out_is_told(written):
    root, _ = written
    listing = list_phrasecut(root, split="test")
    samples = {recipe.key: build(recipe) for recipe in listing.recipes}
    assert list(samples) == ["11", "12", "13", "14", "16", "17"]
    assert samples["14"] == "missing_file"
    ((phrase, reason, detail),) = samples["16"].rejects
    assert (phrase, reason) == ("broken outline", "bad_annotation")
    assert "finite" in detail
    assert not samples["16"].phrases[1].mask.any()  # no outline: the writer drops and counts it
    assert listing.listed == {"images": 7, "pairs": 13}
    assert listing.published == {"images": 2545, "pairs": 14354}
    assert listing.notes == (
        "3 pairs whose boxes have no area are left out, as CLIPSeg's and LD-ZNet's loaders do, and "
        "with them 1 images that have no other",
    )


def test_images_are_copied_and_named_by_their_id(written):
    root, _ = written
    for recipe in list_phrasecut(root, split="test").recipes:
        sample = build(recipe)
        if not isinstance(sample, str):
            assert sample.image == (root / "images" / f"{recipe.key}.jpg").read_bytes()
            assert sample.ids == {"image_id": int(recipe.key)}


def test_tars_have_upright_masks_and_count_all_that_is_left_out(written, tmp_path_factory):
    root, tasks = written
    out = tmp_path_factory.mktemp("out")
    listing = list_phrasecut(root, split="test")
    done = run_ingest(listing, str(out), arguments={}, shard_bytes=10**6)
    assert (done.images, done.pairs) == (4, 6)
    assert done.rejects == {"size": 1, "missing_file": 1, "bad_annotation": 1, "empty_mask": 1}
    with tarfile.open(out / "test-00000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert json.loads(files["16.json"]) == {
        "phrases": ["grey cat", "half a table"],
        "image_id": 16,
        "task_id": ["16__1", "16__4"],
    }
    for key, task_id in (("12", "12__5"), ("17", "17__1")):  # turned by EXIF's 6 and 3
        width, height = FILE_SIZES[int(key)]
        stored = Image.fromarray(draw_slowly(flatten(tasks[task_id]), (height, width)))
        stored.getexif()[0x0112] = EXIF[int(key)]
        upright = ImageOps.exif_transpose(stored)
        mask = Image.open(io.BytesIO(files[f"{key}.mask0.png"]))
        assert mask.size == ImageOps.exif_transpose(Image.open(root / f"images/{key}.jpg")).size
        assert np.array_equal(np.asarray(mask), np.asarray(upright))


def test_the_other_name_of_the_sizes_file_and_ids_as_text_serve(tmp_path):
    tasks = write_phrasecut(tmp_path, "miniv", sizes_name="image_data_split3000.json")
    text = [task | {"image_id": str(task["image_id"])} for task in tasks]
    (tmp_path / "refer_miniv.json").write_text(json.dumps(text))
    listing = list_phrasecut(tmp_path, split="miniv")
    assert listing.published == PUBLISHED["miniv"]
    assert next(listing.recipes).build().phrases[0].text == "wooden chairs"


@pytest.mark.parametrize(("num", "published"), [(2871, PUBLISHED["val"]), (2971, VAL_WITH_MINIV)])
def test_val_tells_whether_it_has_miniv(tmp_path, num, published):
    write_phrasecut(tmp_path, "val")
    square = {"phrase": "a", "Polygons": [[OUTSIDE]], "instance_boxes": [[0, 0, 1, 1]]}
    ids = [*range(1, num), *[num] * (published["pairs"] - num + 1)]
    tasks = [square | {"image_id": i, "task_id": f"{i}"} for i in ids]
    (tmp_path / "refer_val.json").write_text(json.dumps(tasks))
    listing = list_phrasecut(tmp_path, split="val")
    assert listing.listed == listing.published == published
    assert ("with miniv" in listing.notes[0]) == (num == 2971)


def test_an_image_that_no_list_has_is_left_out_by_its_size(written):
    root, _ = written
    listed = json.loads((root / "image_data_split.json").read_text())
    few = [image for image in listed if image["image_id"] != 11]
    (root / "image_data_split.json").write_text(json.dumps(few))
    with pytest.raises(IngestError, match="expected the image's size"):
        next(list_phrasecut(root, split="test").recipes).build()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("refer_test.json", '[{"image_id": 11', "refer_test.json: is no whole JSON list"),
        ("refer_test.json", "{}", "refer_test.json: expected one whole JSON list"),
        ("refer_test.json", "[{}]", "refer_test.json: task 0: expected a whole number as image_id"),
        ("refer_test.json", "[7]", "refer_test.json: task 0: expected a whole number"),
        ("refer_test.json", None, "expected refer_test.json, image_data_split.json and images/"),
        ("image_data_split.json", None, "image_data_split.json: cannot be read"),
        ("image_data_split.json", '[{"image_id": 1}]', "image 1: no height and width"),
    ],
)
def test_files_of_another_form_are_refused_by_name(written, name, content, named):
    root, _ = written
    (root / name).unlink()
    if content is not None:
        (root / name).write_text(content)
    with pytest.raises(SpecError, match=named):
        list_phrasecut(root, split="test")
