"""Looks change the drawing alone, and the standard one nothing at all."""

import hashlib

import numpy as np
import pytest

from pipeline.scenes.looks import LOOKS, STANDARD
from pipeline.scenes.scene import draw_scene, write_corpus

# Of five scenes as they were drawn before there were looks.
SCENES = (("train", 0, 128), ("train", 1, 128), ("val", 3, 64), ("train", 7, 96), ("val", 11, 128))
GOLDEN = "e8b02200b0fd7236dddf8e519777400d253d11f5dcda20fcb1ccdc6ef213c59e"
OTHERS = [look for look in LOOKS.values() if look is not STANDARD]


def draw(index, **options):
    return draw_scene(seed=9, split="train", index=index, **options)


def test_scenes_are_drawn_by_default_as_they_always_were():
    digest = hashlib.sha256()
    for split, index, size_px in SCENES:
        scene = draw_scene(seed=0, split=split, index=index, size_px=size_px)
        digest.update(scene.image.tobytes())
        digest.update(repr(scene.phrases).encode())
        for mask in scene.masks:
            digest.update(mask.tobytes())
    assert digest.hexdigest() == GOLDEN


@pytest.mark.parametrize("look", OTHERS, ids=lambda look: look.name)
def test_a_look_changes_pixels_but_not_what_is_where(look):
    for index in range(3):
        standard, restyled = draw(index), draw(index, look=look)
        assert restyled.objects == standard.objects
        assert restyled.phrases == standard.phrases
        assert (restyled.owner == standard.owner).all()
        change = restyled.image.astype(float) - standard.image.astype(float)
        assert np.abs(change).mean() > 2.0
        assert (draw(index, look=look).image == restyled.image).all()


def test_looks_are_told_apart():
    images = [draw(0, look=look).image for look in LOOKS.values()]
    assert len({image.tobytes() for image in images}) == len(LOOKS)


@pytest.mark.parametrize("num_objects", [1, 2, 5])
def test_the_number_of_objects_can_be_given(num_objects):
    scene = draw(3, num_objects=num_objects)
    assert len(scene.objects) == num_objects
    assert set(np.unique(scene.owner)) - {-1} == set(range(num_objects))


@pytest.mark.parametrize("num_objects", [0, 6])
def test_too_few_and_too_many_objects_are_refused(num_objects):
    with pytest.raises(ValueError, match=f"num_objects must be in 1 to 5, but got {num_objects}"):
        draw(0, num_objects=num_objects)


def test_a_corpus_can_be_restyled(tmp_path):
    names = ("standard", "woven")
    for name in names:
        options = {"num_images": 1, "images_per_tar": 1, "size_px": 64, "look": LOOKS[name]}
        write_corpus(tmp_path / name, split="val", **options)
    ours, theirs = ((tmp_path / x / "scenes-val-00000.tar").read_bytes() for x in names)
    assert ours != theirs
