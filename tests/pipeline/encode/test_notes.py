"""What changes the meaning of data is counted in the outcome and the record, and has a column."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.encode.prepare import prepare_encode
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.store import Store
from tests.support.icc import make_profile

LONG = "circle " * 100


def encode_image(width, height, **options):
    pixels = np.full((height, width, 3), (200, 60, 60), np.uint8)
    pixels[: height // 2, : width // 2] = 250
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Plain, turned, small, wide in colour, with a long phrase, with one phrase twice."""
    path = tmp_path_factory.mktemp("notes") / "x.tar"
    exif = Image.Exif()
    exif[0x0112] = 3
    samples = {
        "plain": (encode_image(80, 64), ["sky"]),
        "turned": (encode_image(80, 64, exif=exif), ["sky"]),
        "small": (encode_image(12, 15), ["sky"]),
        "colour": (encode_image(80, 64, icc_profile=make_profile()), ["sky"]),
        "long": (encode_image(80, 64), [LONG + "one", LONG + "two"]),
        "twice": (encode_image(80, 64), ["dog", "sky", "dog"]),
    }
    with tarfile.open(path, "w") as tar:

        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for key, (image, phrases) in samples.items():
            with Image.open(io.BytesIO(image)) as opened:
                width, height = opened.size
            mask = np.zeros((height, width), bool)
            mask[: height // 2, : width // 2] = True
            out = io.BytesIO()
            Image.fromarray(mask).save(out, "PNG")
            add(f"{key}.jpg", image)
            add(f"{key}.json", json.dumps({"phrases": phrases}).encode())
            for number in range(len(phrases)):
                add(f"{key}.mask{number}.png", out.getvalue())
    return path


def encode(corpus, spec, folder, **fields):
    latents = spec.latents.model_copy(update=fields)
    spec = spec.model_copy(update={"latents": latents, "features": None})
    run = prepare_encode(spec, [str(corpus)], str(folder), batch=4)
    stage = EncodeStage(run.config)
    (outcome,) = [stage.encode(item) for item in run.items]
    assert outcome.status == "committed", outcome.error
    store = Store.open(str(folder))
    (commit,) = store.newest_commits(run.config.latents.folder).values()
    return outcome, commit, store


def read_rows(store, commit):
    rows = store.read_index(commit).to_pylist()
    return {(row["key"], row["phrase"], row["instance"]): row for row in rows}


def test_each_is_counted_and_has_its_column(corpus, spec, tmp_path):
    outcome, commit, store = encode(corpus, spec, tmp_path / "store")
    expected = {
        "cut_prompts": 2,
        "repeated_phrases": 2,
        "enlarged_views": 1,
        "turned_images": 1,
        "profiled_images": 1,
    }
    assert outcome.notes == commit.accounting.notes == expected
    rows = read_rows(store, commit)
    assert {key for key, row in rows.items() if row["prompt_cut"]} == {
        *(("long", LONG + word, 0) for word in ("one", "two")),
    }
    assert [key for key in rows if key[0] == "twice"] == [
        *(("twice", "dog", 0), ("twice", "sky", 0), ("twice", "dog", 1)),
    ]
    odd = {
        "turned": ("orientation", 3, 1),
        "small": ("scale", pytest.approx(64 / 12), 1.0),
        "colour": ("color_profile", "wide", None),
    }
    for key, (column, value, usual) in odd.items():
        for (sample, *_), row in rows.items():
            assert row[column] == (value if sample == key else usual), (sample, column)


def test_pixels_as_stored_and_colours_as_meant(corpus, spec, tmp_path):
    images = {}
    for fields in ({}, {"orientation": "ignore", "color": "srgb"}):
        folder = tmp_path / f"store{len(fields)}"
        outcome, commit, store = encode(corpus, spec, folder, **fields)
        rows = read_rows(store, commit)
        array = store.open_array(store.list_layers()[0], commit, "image")
        for (key, phrase, _), row in rows.items():
            if phrase == "sky":
                images[key, len(fields)] = array.read_rows([row["latent_row"]])[0]
        assert ("turned_images" in outcome.notes) == (not fields)
        assert rows["turned", "sky", 0]["orientation"] == 3  # told in either case
        assert rows["colour", "sky", 0]["color_profile"] == "wide"
    for key in ("plain", "small", "twice"):
        np.testing.assert_array_equal(images[key, 0], images[key, 2])
    np.testing.assert_array_equal(images["turned", 2], images["plain", 0])
    assert images["turned", 0][-1, -1].min() > 240  # the light corner, turned by 180 degrees
    assert np.abs(images["colour", 0][-1, -1].astype(int) - images["colour", 2][-1, -1]).max() > 20
