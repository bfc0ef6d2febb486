"""Drawn negatives: phrases of other samples that the image does not have, by seed and key alone."""

from collections import Counter

import pytest

from pipeline.corpus.text import SampleText, fold_phrase
from pipeline.decode.negatives import NegativePool
from pipeline.spec.fields import LatentsSpec

TEXTS = {
    "a": SampleText(("a dog", "A  Cat"), negatives=("a cow",)),
    "b": SampleText(("a  cat", "a bus")),
    "c": SampleText(("A DOG", "a tree", "a cow")),
    "alone": SampleText(),
    "negatives": SampleText((), negatives=("a ship",)),
}
DISTINCT = {"a dog", "a cat", "a bus", "a tree", "a cow"}


def build(texts=TEXTS, **fields):
    spec = LatentsSpec(model="m", prompts=("{}",), **{"negatives": 2} | fields)
    return NegativePool(texts, spec)


def test_two_unicode_forms_are_one_phrase():
    texts = {"a": SampleText(("caf\u00e9",)), "b": SampleText(("cafe\u0301",))}
    assert build(texts).build_pairs("a", 0) == build(texts).build_pairs("b", 0) == []


@pytest.mark.parametrize("view", range(20))
def test_none_is_the_images_own_whatever_its_case_and_blanks(view):
    pool = build()
    for key, text in TEXTS.items():
        pairs = pool.build_pairs(key, view)
        drawn = [fold_phrase(pair.phrase) for pair in pairs]
        assert len(drawn) == len(set(drawn)) == (2 if text.phrases else 0)
        assert not set(drawn) & set(map(fold_phrase, (*text.phrases, *text.negatives)))
        assert set(drawn) <= DISTINCT
        assert all(pair.negative and pair.mask is None for pair in pairs)


def test_too_few_others_give_all_that_there_are():
    pool = build(negatives=9)
    assert {pair.phrase for pair in pool.build_pairs("a", 0)} == {"a bus", "a tree"}
    assert build({"a": TEXTS["a"]}).build_pairs("a", 0) == []
    assert build({"alone": SampleText()}).build_pairs("alone", 0) == []


def test_draws_follow_seed_key_and_view_and_reach_every_phrase():
    assert build().build_pairs("b", 3) == build().build_pairs("b", 3)
    drawn = Counter(
        pair.phrase for seed in range(40) for pair in build(seed=seed).build_pairs("b", 0)
    )
    assert set(drawn) == {"A DOG", "a cow", "a tree"}
    assert min(drawn.values()) > 10
    by_view = {tuple(pair.phrase for pair in build().build_pairs("b", view)) for view in range(20)}
    assert len(by_view) > 2


def test_the_order_of_the_samples_decides_nothing():
    turned = dict(reversed(TEXTS.items()))
    for key in TEXTS:
        assert build(turned).build_pairs(key, 0) == build().build_pairs(key, 0)
