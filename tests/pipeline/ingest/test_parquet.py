"""``ingest parquet``: columns of each form, rows without bytes, bounded memory."""

import io
import json
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.ingest.parquet import list_parquet
from pipeline.ingest.run import run_ingest
from tests.pipeline.ingest.test_folder import read_tar


def make_image(seed=0, size=(30, 20), kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


IMAGES = [make_image(0), make_image(1, kind="PNG"), make_image(2, kind="WEBP")]


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def ingest(files, out, *, image="image", text=None, **options):
    listing = list_parquet([str(file) for file in files], image=image, text=text)
    options = {"arguments": {}, "shard_bytes": 10**9, **options}
    return run_ingest(listing, str(out), **options)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(IMAGES, pa.binary()),
        pa.array(IMAGES, pa.large_binary()),
        pa.array([{"bytes": data, "path": "x.jpg"} for data in IMAGES]),
        pa.array([{"bytes": data} for data in IMAGES]),
    ],
    ids=["binary", "large", "struct", "no-path"],
)
def test_images_are_copied_whatever_holds_them(tmp_path, column):
    write(tmp_path / "in" / "a.parquet", {"image": column, "label": [1, 2, 3]})
    done = ingest([tmp_path / "in" / "*.parquet"], tmp_path / "out")
    assert (done.images, done.pairs, done.without_phrase) == (3, 0, 3)
    assert list(read_tar(tmp_path / "out" / "images-00000.tar").items()) == [
        ("00000-000000000.jpg", IMAGES[0]),
        ("00000-000000001.png", IMAGES[1]),
        ("00000-000000002.webp", IMAGES[2]),
    ]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a cat", None, " \n"], [["a cat"], None, None]),
        ([["a", "b"], [], None], [["a", "b"], None, None]),
        ([[["a"], ["b", " "]], [None], None], [["a", "b"], None, None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), [["a"], ["b"], ["a"]]),
    ],
    ids=["text", "list", "nested", "dictionary"],
)
def test_a_row_has_as_many_phrases_as_texts(tmp_path, texts, expected):
    write(tmp_path / "a.parquet", {"image": IMAGES, "texts": texts})
    ingest([tmp_path / "a.parquet"], tmp_path / "out", text="texts")
    members = read_tar(tmp_path / "out" / "images-00000.tar")
    found = [members.get(f"00000-{row:09d}.json") for row in range(3)]
    assert [json.loads(one)["phrases"] if one else None for one in found] == expected


def test_a_damaged_page_costs_its_row_group_alone(tmp_path):
    """And the name of a file that is there is no glob."""
    name = tmp_path / "in" / "a[1].parquet"
    big = [make_image(i, size=(90, 70), kind="PNG") for i in range(6)]
    write(name, {"image": big}, row_group_size=2, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(name).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(name.read_bytes())
    data[start : start + 40] = bytes(40)
    name.write_bytes(data)
    done = ingest([name], tmp_path / "out")
    assert (done.images, done.rejects) == (4, {"damaged_file": 2})
    assert "a[1].parquet" in done.examples["damaged_file"]
    again = ingest([name.parent], tmp_path / "again")
    assert again == done


def test_rows_without_bytes_are_told_with_what_to_do(tmp_path):
    column = [
        {"bytes": None, "path": "far/a.jpg"},
        {"bytes": IMAGES[0], "path": None},
        None,
        {"bytes": b"", "path": None},
    ]
    write(tmp_path / "a.parquet", {"image": column})
    done = ingest([tmp_path / "a.parquet"], tmp_path / "out")
    assert (done.images, done.rejects) == (1, {"no_bytes": 3})
    assert "'far/a.jpg' alone; the pictures are not in the file" in done.examples["no_bytes"]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"picture": IMAGES}, "expected a column image, got texts, picture"),
        ({"image": ["https://host/a.jpg"]}, "expected bytes in column image, got string; the pict"),
        ({"image": IMAGES, "texts": [1, 2, 3]}, "expected text or lists of it in column texts"),
        ({"image": [[b"a"]]}, "expected bytes in column image, got list"),
    ],
)
def test_columns_of_other_types_are_refused_before_any_row(tmp_path, columns, match):
    write(tmp_path / "a.parquet", {"texts": ["a"] * len(next(iter(columns.values()))), **columns})
    with pytest.raises(ValueError, match=match):
        list_parquet([str(tmp_path / "a.parquet")], image="image", text="texts")


def test_what_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"a\.parquet: expected a Parquet file"):
        list_parquet([str(tmp_path / "a.parquet")], image="image", text=None)
    for name in ("[b].parquet", "b.parquet"):
        with pytest.raises(
            ValueError, match=f"expected at least one file at .*/{re.escape(name)}, found none"
        ):
            list_parquet([str(tmp_path / name)], image="image", text=None)


def test_row_groups_and_files_are_read_in_order_once(tmp_path):
    """Also where a tar begins in mid-group, or a rerun skips rows."""
    images = [make_image(seed) for seed in range(60)]
    for number in range(2):
        some = images[30 * number : 30 * number + 30]
        write(tmp_path / "in" / f"{number}.parquet", {"image": some}, row_group_size=19)
    done = ingest([tmp_path / "in" / "*"], tmp_path / "out", shard_bytes=20000)
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert len(tars) > 2
    assert [data for tar in tars for data in read_tar(tar).values()] == images
    before = [tar.read_bytes() for tar in tars]
    tars[1].unlink()
    assert ingest([tmp_path / "in" / "*"], tmp_path / "out", shard_bytes=20000) == done
    assert [tar.read_bytes() for tar in tars] == before


def test_memory_is_bounded_by_pages_and_not_by_row_groups(tmp_path):
    noise = np.random.default_rng(0).bytes(100_000)
    images = [IMAGES[0] + noise] * 400
    write(
        tmp_path / "a.parquet",
        {"image": images},
        row_group_size=400,
        write_batch_size=8,
        data_page_size=2**20,
        use_dictionary=False,
    )
    recipes = list_parquet([str(tmp_path / "a.parquet")], image="image", text=None).recipes
    before = pa.total_allocated_bytes()
    most = 0
    tracemalloc.start()
    for recipe in recipes:
        assert recipe.build().image == images[0]
        most = max(most, pa.total_allocated_bytes() - before)
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 15e6 < 400 * len(images[0]) / 2
