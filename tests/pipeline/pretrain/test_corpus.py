"""Captions of whole scenes: what they say of objects is so."""

import numpy as np
import pytest

from pipeline.pretrain.config import CorpusConfig
from pipeline.pretrain.corpus import describe_objects, draw_captioned, list_caption_words
from pipeline.scenes.drawing import SceneObject

CONFIG = CorpusConfig(num_train=1, num_validation=1, size=64)


def place(x, y, shape="circle"):
    return SceneObject(shape, "red", "plain", "small", x=x, y=y, radius=0.1)


@pytest.mark.parametrize(
    ("second", "relation"),
    [
        ((0.8, 0.45), "left of"),
        ((0.1, 0.45), "right of"),
        ((0.45, 0.9), "above"),
        ((0.45, 0.1), "below"),
    ],
)
def test_relations_say_where_the_first_lies_to_the_second(second, relation):
    objects = (place(0.4, 0.4), place(*second, shape="star"))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    found = set()
    for seed in range(40):
        caption, named = describe_objects(objects, np.random.default_rng(seed))
        assert sorted(named) == [0, 1]
        first = "circle" if named[0] == 0 else "star"
        expected = relation if named[0] == 0 else opposite[relation]
        before, after = caption.split(f" {expected} a " if expected in caption else " and a ")
        assert before.endswith(first)
        assert not after.endswith(first)
        found.add((named[0], expected in caption))
    assert found == {(0, True), (1, True), (0, False), (1, False)}  # at times it is just "and"


def test_a_captions_mask_is_of_the_objects_it_names():
    several = 0
    for index in range(40):
        scene = draw_captioned(CONFIG, split="train", index=index)
        caption, mask = scene.phrases[0], scene.masks[0]
        shapes = [word for word in caption.split() if word in {x.shape for x in scene.objects}]
        owners = set(np.unique(scene.owner[mask]).tolist())
        assert -1 not in owners
        assert len(owners) <= len(shapes) <= 3  # an object may be hidden by another
        assert {scene.objects[i].shape for i in owners} <= set(shapes)
        for number in owners:  # all of an object or nothing
            assert mask[scene.owner == number].all()
        several += len(owners) > 1
        assert set(caption.split()) - {"a"} <= set(list_caption_words())
    assert several > 10


def test_shares_of_looks_and_of_few_objects():
    nums = [len(draw_captioned(CONFIG, split="train", index=i).objects) for i in range(60)]
    assert 0.6 < np.mean(np.array(nums) <= 2) <= 1.0
    many = CONFIG.model_copy(update={"few_share": 0.0})
    nums = [len(draw_captioned(many, split="train", index=i).objects) for i in range(20)]
    assert min(nums) >= 2
    assert max(nums) > 2
