"""Phrases for a scene of the demo corpus: which are true of which objects, and which to ask for.

A phrase is true of a set of objects, and its mask is the union of them all. Phrases are chosen
mostly such that every word counts: "red circle" where a red square or a blue circle lies beside.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from pipeline.scenes.drawing import SceneObject

PLACES = ("left", "right", "top", "bottom")
# Centres this far apart, as a fraction of the side, make "the left one" unambiguous.
MIN_PLACE_GAP = 0.16


def list_phrases(objects: Sequence[SceneObject]) -> dict[str, frozenset[int]]:
    """Return every phrase that is true of some objects, with the numbers of those objects.

    A description is up to three adjectives (size, texture, colour) and a noun, the object's shape
    or the word "shape". Where a description of at most one adjective fits two or more objects, "the
    left ..." and the like name the outermost, if its centre is clearly apart from the next.
    """
    attributes = [(o.size, o.texture, o.colour, o.shape) for o in objects]
    phrases: dict[str, frozenset[int]] = {}
    for own in attributes:
        for keep in itertools.product((False, True), repeat=4):
            if any(keep):
                wanted = tuple(a if k else None for a, k in zip(own, keep, strict=True))
                true_of = frozenset(
                    number
                    for number, other in enumerate(attributes)
                    if all(w is None or w == a for w, a in zip(wanted, other, strict=True))
                )
                phrases[" ".join([a for a in wanted[:3] if a] + [wanted[3] or "shape"])] = true_of
    for phrase, true_of in list(phrases.items()):
        if len(true_of) >= 2 and len(phrase.split()) <= 2:
            for place, number in _outermost(objects, true_of).items():
                phrases[f"the {place} {phrase}"] = frozenset({number})
    return phrases


def choose_phrases(
    rng: np.random.Generator, true_of: dict[str, frozenset[int]], num_objects: int
) -> tuple[str, ...]:
    """Choose two to five phrases, mostly such that every word counts, of different objects."""
    candidates = list(true_of)
    weights = np.array([_weigh(phrase, true_of, num_objects) for phrase in candidates])
    chosen: list[str] = []
    for _ in range(min(int(rng.integers(2, 6)), len(candidates))):
        phrase = candidates[int(rng.choice(len(candidates), p=weights / weights.sum()))]
        chosen.append(phrase)
        for number, other in enumerate(candidates):
            if true_of[other] == true_of[phrase]:
                weights[number] *= 0.0 if other == phrase else 0.2
    return tuple(chosen)


def _outermost(objects: Sequence[SceneObject], among: frozenset[int]) -> dict[str, int]:
    """Return the number of the object that each unambiguous place word names."""
    named = {}
    for low, high, axis in (("left", "right", "x"), ("top", "bottom", "y")):
        order = sorted(among, key=lambda number: getattr(objects[number], axis))
        at = [getattr(objects[number], axis) for number in order]
        if at[1] - at[0] >= MIN_PLACE_GAP:
            named[low] = order[0]
        if at[-1] - at[-2] >= MIN_PLACE_GAP:
            named[high] = order[-1]
    return named


def _weigh(phrase: str, true_of: dict[str, frozenset[int]], num_objects: int) -> float:
    """Weight of a phrase among those of its scene when they are drawn."""
    parts = phrase.split()
    if parts[0] == "the":
        return 2.0 if parts[-1] != "shape" else 0.5
    weight = (3.0, 5.0, 4.0, 1.5)[len(parts) - 1] * (0.35 if parts[-1] == "shape" else 1.0)
    shorter = [" ".join(parts[:i] + parts[i + 1 :]) for i in range(len(parts) - 1)]
    if parts[-1] != "shape":
        shorter.append(" ".join([*parts[:-1], "shape"]))
    # A word counts if without it the phrase would be true of more ("shape" alone: of everything).
    every = len(true_of[phrase]) < num_objects and all(
        len(true_of.get(s, range(num_objects))) > len(true_of[phrase]) for s in shorter
    )
    return weight * (5.0 if every else 0.6)
