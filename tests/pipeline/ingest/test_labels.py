"""Maps of class ids: pairs by name, masks pixel by pixel, names as each dataset writes them."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.ingest.labels import decode_labels, list_labels, read_names
from pipeline.ingest.run import run_ingest
from pipeline.ingest.sample import IngestError
from tests.pipeline.decode.test_images import make_chunk, make_png

HEIGHT, WIDTH = 6, 8
CAMVID = Path(__file__).parents[4] / "shared" / "corpora" / "camvid"
CAMVID_CLASSES = (  # SegNet's ids from 0 on, in the words of the tars
    *("sky", "building", "column or pole", "road", "pavement", "tree"),
    *("traffic sign", "fence", "car", "pedestrian", "bicyclist"),
)


def save_image(path, size=(HEIGHT, WIDTH), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (200, 30, 90)).save(path, **options)
    return path.read_bytes()


def save_labels(path, ids, *, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(ids))
    if palette:
        image = image.convert("L")
        image.putpalette([(7 * n) % 256 for n in range(768)])
        assert image.mode == "P"
    image.save(path)


def draw_ids(*ids, dtype=np.uint8):
    """A map of stripes of ids."""
    return np.repeat(np.array(ids, dtype), -(-WIDTH // len(ids)))[None, :WIDTH].repeat(HEIGHT, 0)


def write_names(folder, text="0 road\n1 sky\n2 car\n"):
    file = folder / "names.txt"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def folder(tmp_path):
    """One image with a map of ids 0, 1, 255 and 2."""
    save_image(tmp_path / "images" / "a.jpg")
    save_labels(tmp_path / "labels" / "a.png", draw_ids(0, 1, 255, 2))
    write_names(tmp_path)
    return tmp_path


def list_folder(folder, images="images/*.jpg", labels="labels/*.png", **options):
    return list_labels(f"{folder}/{images}", f"{folder}/{labels}", folder / "names.txt", **options)


def build(folder, *patterns, **options):
    return [recipe.build() for recipe in list_folder(folder, *patterns, **options).recipes]


@pytest.mark.parametrize("palette", [False, True])
def test_classes_are_phrases_in_the_order_of_ids_and_ignored_ids_a_region(folder, palette):
    ids = draw_ids(2, 255, 0, 1)
    save_labels(folder / "labels" / "a.png", ids, palette=palette)
    (sample,) = build(folder, ignore=[255])
    assert sample.image == (folder / "images" / "a.jpg").read_bytes()
    assert [phrase.text for phrase in sample.phrases] == ["road", "sky", "car"]
    for number, phrase in enumerate(sample.phrases):
        assert phrase.ids == {"class_id": number}
        assert np.array_equal(phrase.mask, ids == number)
    assert np.array_equal(sample.ignore, ids == 255)
    assert sample.rejects == ()


def test_class_without_a_name_is_left_out_and_told(folder):
    (sample,) = build(folder)
    assert [phrase.text for phrase in sample.phrases] == ["road", "sky", "car"]
    assert not sample.ignore.any()
    detail = "12 pixels of a class that --names lacks"
    assert sample.rejects == (("class 255", "no_name", detail),)


@pytest.mark.parametrize("ignore", [[], [255], [0, 255]])
def test_image_without_any_named_class_is_left_out(folder, ignore):
    save_labels(folder / "labels" / "a.png", draw_ids(255, 255 if ignore else 9))
    with pytest.raises(IngestError, match="no_phrase"):
        build(folder, ignore=ignore)


def test_ids_of_16_bits_are_read_whole(folder):
    ids = draw_ids(1, 257, 3000, 0, dtype=np.uint16)
    save_labels(folder / "labels" / "a.png", ids)
    write_names(folder, "257 gate\n3000 lamp\n1 wall")
    (sample,) = build(folder, ignore=[0])
    assert [phrase.text for phrase in sample.phrases] == ["wall", "gate", "lamp"]
    assert np.array_equal(sample.phrases[1].mask, ids == 257)
    assert np.array_equal(sample.ignore, ids == 0)


@pytest.mark.parametrize("colour", [0, 3])
@pytest.mark.parametrize(
    ("bits", "row"), [(1, b"\x4a"), (2, b"\x1b\xe4"), (4, b"\x07\x92\xf1\x35")]
)
def test_ids_of_few_bits_are_not_scaled(colour, bits, row):
    palette = b"" if colour == 0 else make_chunk(b"PLTE", bytes(3 * 2**bits))
    data = make_png([row] * 3, bits=bits, colour=colour, width=8, before=palette)
    digits = "".join(f"{byte:08b}" for byte in row)
    expected = [int(digits[at : at + bits], 2) for at in range(0, 8 * bits, bits)]
    assert decode_labels(data, height=3, width=8).tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("mode", "size", "reason"),
    [
        ("RGB", (HEIGHT, WIDTH), "colours"),
        ("RGBA", (HEIGHT, WIDTH), "colours"),
        ("LA", (HEIGHT, WIDTH), "colours"),
        ("L", (WIDTH, HEIGHT), "size"),
        ("P", (HEIGHT, WIDTH + 1), "size"),
    ],
)
def test_map_of_colours_or_of_another_size_costs_its_image(folder, mode, size, reason):
    Image.new(mode, size[::-1]).save(folder / "labels" / "a.png")
    with pytest.raises(IngestError, match=r"labels/a\.png") as caught:
        build(folder)
    assert caught.value.reason == reason


def make_png_without_rows():
    """A PNG whose last rows are missing, in two chunks: Pillow shows them as 0 then."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 0)
    stream = zlib.compress(bytes([0, *[2] * WIDTH]) * 3)
    chunks = ((b"IHDR", header), (b"IDAT", stream[:7]), (b"IDAT", stream[7:]), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(make_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize("damage", ["jpeg", "short", "rows", "checksum", "empty"])
def test_damaged_map_is_refused_and_not_read_as_class_0(folder, damage):
    path = folder / "labels" / "a.png"
    data = path.read_bytes()
    jpeg = (folder / "images" / "a.jpg").read_bytes()
    damaged = {
        "jpeg": jpeg,
        "short": data[:-20],
        "rows": make_png_without_rows(),
        "checksum": data.replace(b"IDAT", b"IDAT\xff", 1),
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(IngestError) as caught:
        build(folder)
    assert caught.value.reason == "bad_labels"


def test_files_pair_by_what_the_stars_stand_for_as_in_cityscapes(folder):
    for city in ("ulm", "bonn"):
        stem = f"{city}_000001_000019"
        save_image(folder / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png")
        for kind in ("labelIds", "instanceIds", "color"):
            path = folder / "gtFine" / "val" / city / f"{stem}_gtFine_{kind}.png"
            save_labels(path, draw_ids(1 if city == "ulm" else 2, 99))
    for stars in ("*/*", "**/*"):
        images = f"leftImg8bit/val/{stars}_leftImg8bit.png"
        listing = list_folder(folder, images, f"gtFine/val/{stars}_gtFine_labelIds.png")
        bonn, ulm = listing.recipes
        assert [one.key for one in (bonn, ulm)] == [
            "bonn__bonn_000001_000019",
            "ulm__ulm_000001_000019",
        ]
        assert [one.build().phrases[0].text for one in (bonn, ulm)] == ["car", "sky"]
        assert (listing.listed, listing.notes) == ({"images": 2}, ())


def test_image_without_a_map_is_counted_and_map_without_an_image_a_reject(folder):
    save_image(folder / "images" / "b.jpg")
    save_labels(folder / "labels" / "c.png", draw_ids(0))
    listing = list_folder(folder)
    assert listing.notes == ("1 images without a map of classes: left out",)
    assert listing.listed == {"images": 2}
    a, c = listing.recipes
    assert (a.key, c.key) == ("a", "c")
    with pytest.raises(IngestError, match=r"c\.png.*no image") as caught:
        c.build()
    assert caught.value.reason == "missing_file"


@pytest.mark.parametrize(
    "lines",
    ["b\nd\n", "b  1\nd -1\n", "images/b.jpg labels/b.png\nd.png\n", "\ufeff/x/labels/b.png\nd"],
)
def test_a_list_chooses_images_as_in_voc(folder, lines):
    for name in "bc":
        save_image(folder / "images" / f"{name}.jpg")
        save_labels(folder / "labels" / f"{name}.png", draw_ids(0))
    (folder / "train.txt").write_text(lines, encoding="utf-8")
    listing = list_folder(folder, only=folder / "train.txt")
    assert [recipe.key for recipe in listing.recipes] == ["b"]
    assert listing.notes == (
        "2 maps of classes that train.txt does not name: left out",
        "1 names in train.txt without a map of classes",
    )


def test_a_list_that_names_nothing_is_refused(folder):
    with pytest.raises(ValueError, match="expected names of images"):
        list_folder(folder, only=folder / "names.txt")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("images/*.jpeg",), "--images: .* that files match"),
        (("images/*.jpg", "labels/a*.tif"), "--labels: .* that files match"),
        (("images/a.jpg",), "--images: expected a pattern such as"),
        (("images/*.*",), "as many \\*"),
        (("**/*.jpg",), "as many \\*"),
    ],
)
def test_patterns_that_pair_nothing_are_refused(folder, patterns, message):
    with pytest.raises(ValueError, match=message):
        list_folder(folder, *patterns)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("road\nsky\n\ntraffic light\n", {0: "road", 1: "sky", 2: "traffic light"}),
        (
            "0 road\n1\tsky\n7: traffic light\n9,car\n",
            {0: "road", 1: "sky", 7: "traffic light", 9: "car"},
        ),
        ("-1 license plate\n0 road\r\n", {-1: "license plate", 0: "road"}),
        ("1 wall, bricks\n2 building;edifice\n", {1: "wall", 2: "building"}),
        ("wall, bricks\nbuilding, edifice\n", {0: "wall", 1: "building"}),
        ("name,id\ndog,5\ncat, 1\n", {5: "dog", 1: "cat"}),
        ("# classes\nid,name\n5,dog\n", {5: "dog"}),
        ("5,dog\n1,cat\n", {5: "dog", 1: "cat"}),
        ("\ufeff1 café\n", {1: "café"}),
        (
            "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1576\t11664\t1172\t1\twall   \n"
            "2\t0.1072\t6046\t612\t1\tbuilding, edifice\n",
            {1: "wall", 2: "building"},
        ),
        (
            'Idx,Ratio,Train,Val,Stuff,Name\n1,0.1576,11664,1172,1,wall\n2,0,1,1,1,"door, gate"\n',
            {1: "wall", 2: "door"},
        ),
        ('{"7": "road", "11": "building"}', {7: "road", 11: "building"}),
        ('["road", "sky"]', {0: "road", 1: "sky"}),
    ],
)
def test_names_are_read_as_datasets_write_them(tmp_path, text, expected):
    assert read_names(write_names(tmp_path, text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0 road\nsky\n",  # an id is missing
        "0 road\n0 sky\n",
        '{"0": "road", "0": "sky"}',
        '{"road": 0}',
        '{"0": {"name": "road"}}',
        '["road", 3]',
        '["road"',
        "[" * 100_000,
        "64 128 64\tAnimal\n192 0 128\tArchway\n",  # CamVid's colours
        "name,r,g,b\nAnimal,64,128,64\n",
        "0 ,,\n1 sky\n",
        "Idx\tName\nwall\n",
        "a,dog,5\nb,cat,6\n",  # never numbered by line
    ],
)
def test_what_names_no_classes_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"names\.txt: expected") as caught:
        read_names(write_names(tmp_path, text))
    assert len(str(caught.value)) < 1000


def read_tars(folder):
    """Every member of a folder's tars, by name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {one.name: tar.extractfile(one).read() for one in tar}
    return found


def read_mask(data):
    return np.array(Image.open(io.BytesIO(data)))


def test_tars_hold_masks_and_ignore_region_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    save_image(folder / "images" / "a.jpg", exif=exif)
    ids = draw_ids(0, 1, 255, 2)
    run_ingest(
        list_folder(folder, ignore=[255]), str(folder / "out"), arguments={}, shard_bytes=1 << 20
    )
    members = read_tars(folder / "out")
    assert json.loads(members["a.json"]) == {
        "phrases": ["road", "sky", "car"],
        "class_id": [0, 1, 2],
    }
    for number in range(3):
        assert np.array_equal(
            read_mask(members[f"a.mask{number}.png"]), np.rot90(ids == number, -1)
        )
    assert np.array_equal(read_mask(members["a.ignore.png"]), np.rot90(ids == 255, -1))


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"{CAMVID} is not there")
def test_camvid_comes_back_from_its_maps_as_it_stands_in_the_tars(tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "val.tar").symlink_to(CAMVID / "camvid-val-00001.tar")
    expected = read_tars(tmp_path / "tars")
    stems = [Path(name).stem for name in expected if name.endswith(".jpg")]
    for stem in stems:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{stem}.jpg").write_bytes(expected[f"{stem}.jpg"])
        ids = np.full((360, 480), 11, np.uint8)  # void
        for number, phrase in enumerate(json.loads(expected[f"{stem}.json"])["phrases"]):
            ids[read_mask(expected[f"{stem}.mask{number}.png"])] = CAMVID_CLASSES.index(phrase)
        save_labels(tmp_path / "labels" / f"{stem}.png", ids, palette=True)
    write_names(tmp_path, "\n".join(CAMVID_CLASSES))
    listing = list_folder(tmp_path, ignore=[11])
    run_ingest(listing, str(tmp_path / "out"), arguments={}, shard_bytes=1 << 30)
    made = read_tars(tmp_path / "out")
    assert len(stems) > 30
    assert {name for name in made if not name.endswith(".ignore.png")} == set(expected)
    for name, data in expected.items():
        if name.endswith(".jpg"):
            assert made[name] == data
        elif name.endswith(".json"):
            assert json.loads(made[name])["phrases"] == json.loads(data)["phrases"]
        else:
            assert np.array_equal(read_mask(made[name]), read_mask(data))
