"""A tar with and without masks, phrases, negatives and ignore regions, as a store holds it."""

import io
import json
import tarfile

import numpy as np
import pytest
import zarr
from PIL import Image

from pipeline.encode.prepare import prepare_encode
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.store import Store
from pipeline.upkeep.verify import verify_store

HEIGHT, WIDTH = 80, 100


def encode_picture(pixels, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def make_mask(left):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:60, left : left + 30] = True
    return mask


MASKS = [make_mask(30), make_mask(15)]
IGNORE = make_mask(40)


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    """Six images: with masks, a caption, no phrase (twice), phrases alone, negatives alone."""
    rng = np.random.default_rng(0)
    image = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(6)]
    ours = {"phrases": ["dog", "cat"], "negatives": ["cow"], "task_id": ["t1", "t2"], "uid": 7}
    members = {
        "a.jpg": encode_picture(image[0]),
        "a.json": json.dumps(ours).encode(),
        "a.mask0.png": encode_picture(MASKS[0]),
        "a.mask1.png": encode_picture(MASKS[1].view(np.uint8)),  # of 0 and 1
        "a.ignore.png": encode_picture(IGNORE),
        "b.v2.jpg": encode_picture(image[1], "WEBP"),
        "b.v2.txt": b" a\nbus ",
        "b.v2.json": b'{"caption": "other", "uid": "u2"}',
        "b.v2.cls": b"5",
        "c.png": encode_picture(image[2]),
        "c.json": b'{"image": {}, "annotations": [{}]}',
        "d.jpg": encode_picture(image[3]),
        "d.txt": b" \n",
        "e.jpg": encode_picture(image[4]),
        "e.json": b'{"phrases": ["tree", "DOG"]}',
        "f.jpg": encode_picture(image[5]),
        "f.json": b'{"phrases": [], "negatives": ["ship"]}',
        "f.depth.png": encode_picture(image[5]),
        "__MACOSX/._a.jpg": b"x",
        "__MACOSX/plain.jpg": b"x",
        ".DS_Store": b"x",
    }
    path = tmp_path_factory.mktemp("mixed") / "x.tar"
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def encode(tar, folder, ldm_folder, **fields):
    latents = LatentsSpec(model=str(ldm_folder), size=64, prompts=("{}",), **fields)
    features = FeaturesSpec(blocks=(6,), timesteps=(300,))
    run = prepare_encode(Spec(latents=latents, features=features), [str(tar)], str(folder), batch=4)
    stage = EncodeStage(run.config)
    assert [stage.encode(item).status for item in run.items] == ["committed"]
    store = Store.open(str(folder))
    assert [check.damage for check in verify_store(store)] == [[]] * 2
    layers = store.list_layers()
    (commit,) = store.read_commits(layers[0].folder)
    rows = store.read_index(commit).to_pylist()
    groups = [
        zarr.open_group(folder / found.data_folder / "arrays.zarr", mode="r")
        for layer in layers
        for found in store.read_commits(layer.folder)
    ]
    return commit, rows, groups


@pytest.fixture(scope="module")
def mixed(tar, tmp_path_factory, ldm_folder):
    folder = tmp_path_factory.mktemp("store") / "s"
    return encode(tar, folder, ldm_folder, negatives=2, keep_json=("uid", "task_id"))


def test_every_pair_says_what_it_has(mixed):
    commit, rows, _ = mixed
    columns = ("key", "phrase", "mask_row", "negative", "ignore_row", "uid", "task_id")
    told = [
        tuple(row[name] for name in columns) for row in rows if row["prompt"] or not row["phrase"]
    ]
    assert told[:9] == [
        ("a", "dog", 0, False, 0, "7", "t1"),
        ("a", "cat", 1, False, 0, "7", "t2"),
        ("a", "cow", None, True, 0, "7", None),
        ("b.v2", "a bus", None, False, None, "u2", None),
        ("c", None, None, False, None, None, None),
        ("d", None, None, False, None, None, None),
        ("e", "tree", None, False, None, None, None),
        ("e", "DOG", None, False, None, None, None),
        ("f", "ship", None, True, None, None, None),
    ]
    drawn = [row["key"] for row in rows[9:]]
    assert drawn == ["a", "a", "b.v2", "b.v2", "e", "e"]
    assert all(row["negative"] and row["mask_area"] is None for row in rows[9:])
    assert all((row["mask_area"] is None) == (row["mask_row"] is None) for row in rows)
    assert commit.rows == {"pairs": 15, "views": 6, "prompts": 8, "masks": 2, "ignores": 1}


def test_the_accounting_is_stored_rejected_and_set_aside(mixed):
    account = mixed[0].accounting
    assert (account.stored_samples, account.rejected_samples) == (6, 0)
    assert account.rejects == {"unexpected_member": 1}  # f.depth.png
    # b's JSON and class, c's annotations, the three of a Mac.
    assert account.set_aside_members == 6


def test_masks_and_ignore_regions_are_the_crops_of_those_that_are_there(mixed):
    _, _, (latents, _) = mixed
    left = (WIDTH - HEIGHT) // 2

    def crop(mask):
        square = Image.fromarray(mask[:, left : left + HEIGHT].astype(np.uint8))
        return np.asarray(square.resize((64, 64), Image.Resampling.NEAREST))

    np.testing.assert_array_equal(latents["mask"][:], [crop(mask) for mask in MASKS])
    np.testing.assert_array_equal(latents["ignore"][:], [crop(IGNORE)])


def test_dimensions_of_one_name_have_one_length(mixed):
    for group in mixed[2]:
        sizes = {}
        for _, array in group.arrays():
            for name, size in zip(array.metadata.dimension_names, array.shape, strict=True):
                assert sizes.setdefault(name, size) == size, name


def test_without_stored_text_the_features_are_the_same(mixed, tar, tmp_path, ldm_folder):
    commit, rows, (latents, features) = encode(
        tar, tmp_path / "s", ldm_folder, negatives=2, keep_json=("uid", "task_id"), text="none"
    )
    _, stored_rows, (stored_latents, stored) = mixed
    assert commit.rows["prompts"] == latents["text"].shape[0] == 1
    np.testing.assert_array_equal(latents["text"][:], stored_latents["text"][:1])
    assert [row["text_row"] for row in rows] == [None if row["prompt"] else 0 for row in rows]
    unset = {"text_row": None}
    assert [row | unset for row in rows] == [row | unset for row in stored_rows]
    np.testing.assert_allclose(features["block06"][:], stored["block06"][:], rtol=1e-3, atol=1e-3)


def test_phrase_crops_of_a_sample_without_masks_are_its_centre(tar, tmp_path, ldm_folder):
    fields = {"crop": "phrase", "views": 2, "flip": True, "negatives": 1}
    commit, rows, (latents, _) = encode(tar, tmp_path / "s", ldm_folder, **fields)
    views = {}
    for row in rows:
        views.setdefault((row["key"], row["view"], row["flipped"]), []).append(row)
    of_key = {key: [v for v in views if v[0] == key] for key in "ace"}
    assert [view[1:] for view in of_key["a"]] == [(i, i % 2 == 1) for i in range(8)]
    assert [view[1:] for view in of_key["c"]] == [(0, False), (1, True)]
    assert {row["box_left"] for row in views["e", 0, False]} == {10}  # the centre's
    assert [row["phrase"] for row in views["e", 0, False][:2]] == ["tree", "DOG"]
    own = [row["view"] for row in rows if row["phrase"] == "cow" and row["key"] == "a"]
    assert set(own) >= {0, 1}  # the sample's own negative is of its first crop
    drawn = {view: [row for row in of_view if row["negative"]] for view, of_view in views.items()}
    for (key, number, _), found in drawn.items():
        expected = 0 if key in ("c", "d") else 1 + (key == "a" and number < 2)
        assert len(found) == expected, (key, number)
    assert latents["ignore"].shape[0] == commit.rows["ignores"] == 8
    for view in of_key["a"][::2]:
        plain, mirrored = (views["a", view[1] + i, bool(i)][0]["ignore_row"] for i in (0, 1))
        np.testing.assert_array_equal(
            latents["ignore"][mirrored], latents["ignore"][plain][:, ::-1]
        )
