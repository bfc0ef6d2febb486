"""The scenes that the tiny latent diffusion model is trained on: looks, and captions of the whole.

Besides single phrases, which a head will ask for, a scene has a caption that names up to three of
its objects and where two of them lie: "red circle left of a large blue square".
"""

import itertools
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.pretrain.config import CorpusConfig
from pipeline.scenes.drawing import SceneObject
from pipeline.scenes.looks import LOOKS, Look
from pipeline.scenes.scene import Scene, draw_scene, list_words, write_tars

CAPTION_WORDS = ("above", "and", "below")
_NAMED = 3  # objects a caption names at most


def list_caption_words() -> tuple[str, ...]:
    """Every word of phrases, prompt templates and captions, sorted."""
    return tuple(sorted({*list_words(), *CAPTION_WORDS}))


def draw_captioned(config: CorpusConfig, split: str, index: int) -> Scene:
    """Draw scene ``index`` of a split; its phrases are a caption and a few single ones."""
    rng = np.random.Generator(np.random.PCG64([config.seed, zlib.crc32(split.encode()), index, 1]))
    look = choose_look(config, rng)
    few = rng.random() < config.few_share
    scene = draw_scene(
        seed=config.seed,
        split=split,
        index=index,
        size_px=config.size,
        look=look,
        num_objects=int(rng.integers(1, 3)) if few else None,
    )
    caption, named = describe_objects(scene.objects, rng)
    others = [i for i, phrase in enumerate(scene.phrases) if phrase != caption]
    others = others[: config.num_phrases]
    return replace(
        scene,
        phrases=(caption, *(scene.phrases[i] for i in others)),
        masks=(np.isin(scene.owner, named), *(scene.masks[i] for i in others)),
    )


def choose_look(config: CorpusConfig, rng: np.random.Generator) -> Look:
    """Draw a look: the first with its share, each other with an equal part of the rest."""
    first, *others = config.looks
    if not others or rng.random() < config.standard_share:
        return LOOKS[first]
    return LOOKS[others[int(rng.integers(len(others)))]]


def describe_objects(
    objects: tuple[SceneObject, ...], rng: np.random.Generator
) -> tuple[str, tuple[int, ...]]:
    """Return a caption and the numbers of the objects that it names."""
    named = tuple(int(i) for i in rng.permutation(len(objects))[:_NAMED])
    texts = [_describe_object(objects[i], rng) for i in named]
    if len(named) == 2:
        first, second = (objects[i] for i in named)
        return f"{texts[0]} {_relate(first, second, rng)} a {texts[1]}", named
    return " and a ".join(texts), named


def _describe_object(scene_object: SceneObject, rng: np.random.Generator) -> str:
    words = (scene_object.size, scene_object.texture, scene_object.colour)
    kept = itertools.compress(words, rng.random(3) < (0.5, 0.5, 0.9))
    return " ".join([*kept, scene_object.shape])


def _relate(first: SceneObject, second: SceneObject, rng: np.random.Generator) -> str:
    """Say where the first lies from the second, along the longer axis; at times just "and"."""
    right, down = second.x - first.x, second.y - first.y
    if rng.random() < 0.2:
        return "and"
    if abs(right) >= abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def write_captioned(folder: Path, config: CorpusConfig) -> None:
    """Write the scenes as tars ``pretrain-<split>-00000.tar`` and so on; those there stay."""
    for split, num in (("train", config.num_train), ("val", config.num_validation)):
        draw = partial(draw_captioned, config, split)
        write_tars(folder, "pretrain", split, draw, num, config.images_per_tar, keep=True)
