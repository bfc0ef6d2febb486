"""The demo's recipe: phrases kept from its heads, and sweeps that name what is there."""

import re
from pathlib import Path

import pytest

from pipeline.base.yaml import load_yaml
from pipeline.demo.recipe import (
    HELD_OUT,
    RESTYLED,
    SIZES,
    DemoRecipe,
    build_heads_sweep,
    build_map_sweep,
)
from pipeline.demo.report import CONTRASTS, GROUPS, SHOWN
from pipeline.demo.run import SEED
from pipeline.scenes.drawing import COLOURS, SHAPES, TEXTURES
from pipeline.scenes.scene import draw_scene
from pipeline.sweep.config import VALIDATION

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"


@pytest.fixture(scope="module")
def recipe():
    return load_yaml(RECIPES / "demo.yaml", DemoRecipe)


def test_every_shape_lacks_two_colours_and_a_texture(recipe):
    for shape in SHAPES:
        colours = [c for c in COLOURS if re.search(recipe.held_out, f"the left {c} {shape}")]
        textures = [t for t in TEXTURES if re.search(recipe.held_out, f"large {t} {shape}")]
        assert (len(colours), len(textures)) == (2, 1)
        (texture,) = textures
        assert re.search(recipe.held_out, f"{texture} green {shape}")
        assert not re.search(recipe.held_out, f"large {shape}")
    for word in (*COLOURS, *TEXTURES):  # each word is learnt, with some shape
        assert any(not re.search(recipe.held_out, f"{word} {shape}") for shape in SHAPES)


@pytest.mark.parametrize("size", sorted(SIZES))
def test_there_are_held_out_phrases_to_score(recipe, size):
    scenes = (
        draw_scene(seed=SEED, split="val", index=index, size_px=recipe.latents.size)
        for index in range(SIZES[size].validation_images)
    )
    held_out = [p for scene in scenes for p in scene.phrases if re.search(recipe.held_out, p)]
    assert len(held_out) >= {"default": 40, "smallest": 3}[size]


def test_no_head_is_trained_on_them_and_two_tests_are_scored(recipe):
    layers = {name: f"features-{name}" for name in recipe.layers}
    sweep = build_heads_sweep(recipe, SIZES["default"], layers, "latents-0")
    bases = dict(sweep.list_bases())
    assert {config.data.train_filter.without_phrase for config in bases.values()} == {
        recipe.held_out
    }
    assert {config.data.latents for config in bases.values()} == {"latents-0"}
    assert bases["LD-ZNet"].data.features == "features-fixed"
    assert bases["probe, empty prompt"].data.features == "features-empty"
    assert bases["ZNet"].num_steps == recipe.train.num_steps
    assert bases["probe"].num_steps == recipe.probe["num_steps"]
    smallest = dict(build_heads_sweep(recipe, SIZES["smallest"], layers, "latents-0").list_bases())
    assert smallest["probe"].num_steps == SIZES["smallest"].probe_steps
    assert sweep.tests[HELD_OUT].filter.phrase == recipe.held_out
    assert sweep.tests[RESTYLED].tasks == f"*{recipe.restyled}*"
    assert {VALIDATION, *sweep.tests} == set(GROUPS)
    compared = {name for c in CONTRASTS for name in (c.ours, c.theirs)} | set(SHOWN)
    assert compared == set(bases)


def test_the_map_has_a_cell_for_each_block_and_timestep(recipe):
    size = SIZES["smallest"]
    sweep = build_map_sweep(recipe, size, "features-map", "latents-0")
    assert sweep.heat_map
    assert sweep.axes.blocks.each == size.map_blocks
    assert set(size.map_blocks) <= set(recipe.map_layer.blocks)
    assert set(size.map_draws) <= set(range(recipe.map_layer.num_draws))
    assert sweep.base.data.features == "features-map"
    grids = {name: config.head.options.grid for name, config in sweep.list_bases()}
    assert grids == recipe.map_variants == {"full grid": None, "4x4": 4}
    assert build_map_sweep(recipe, SIZES["default"], "f", "l").axes.blocks.each == "all"
