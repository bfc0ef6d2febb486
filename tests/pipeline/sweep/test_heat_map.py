"""The heat map: each figure in its own cell, one map a family of probes, a picture that is one."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluate.scoring import FIGURE_NAMES
from pipeline.sweep.heat_map import build_maps, draw_heat_map
from pipeline.sweep.results import SCHEMA


def row(block, t, seed, ap, **more):
    given = {"status": "done", "variant": "base", "head": "probe", "features": "layer"}
    given |= {"blocks": [block], "timesteps": [t], "draws": [t // 100], "seed": seed, "AP": ap}
    given |= {"num_pairs": 4, "scored_on": "validation"}
    return dict.fromkeys(SCHEMA.names) | dict.fromkeys(FIGURE_NAMES, 0.0) | given | more


def value(block, t):
    return block / 100 + t / 10_000


GRID = [
    row(block, t, seed, value(block, t) + (seed - 1) / 1000)
    for seed in (0, 1, 2)
    for t in (900, 100, 500)
    for block in (16, 1)
]


def test_what_a_test_scored_is_in_no_cell():
    others = [row(1, 100, seed, 0.9, scored_on="woven") for seed in (0, 1, 2)]
    (found,) = build_maps([*others, *GRID])
    assert found.values[0, 0] == pytest.approx(100 * value(1, 100))


def test_each_value_is_in_the_cell_of_its_block_and_timestep():
    (found,) = build_maps(GRID)
    assert (found.blocks, found.timesteps) == ((1, 16), (100, 500, 900))
    for i, t in enumerate(found.timesteps):
        for j, block in enumerate(found.blocks):
            assert found.values[i, j] == pytest.approx(100 * value(block, t))
    assert found.seeds == (3, 3)
    assert found.num_pairs == 4
    assert found.deviation == pytest.approx(0.1)  # of -0.1, 0 and 0.1 percent


def test_what_is_no_cell_is_left_out_and_a_gap_stays_one():
    rows = [*GRID[:-1], row(1, 100, 0, 0.9, head="znet"), row(1, 100, 0, 0.9, blocks=[1, 16])]
    rows += [row(1, 100, 0, 0.9, timesteps=[100, 500], draws=[1, 5])]
    rows += [row(1, 100, 0, 0.9, timesteps=None, draws=None)]
    rows = [r for r in rows if not (r["blocks"] == [16] and r["timesteps"] == [900])]
    (found,) = build_maps(rows)
    assert np.isnan(found.values[2, 1])
    assert np.isfinite(found.values).sum() == 5
    assert found.seeds == (2, 3)
    assert build_maps([]) == []


def test_layers_have_maps_of_their_own():
    other = [r | {"features": "int8", "features_layer": "x"} for r in GRID]
    assert [found.name for found in build_maps([*GRID, *other])] == ["layer", "int8"]


@pytest.mark.parametrize(
    ("variants", "names"),
    [(("full grid", "4x4"), ["full grid", "4x4"]), (("base", "base"), ["grid none", "grid 4"])],
)
def test_options_name_a_map_where_no_variant_does(variants, names):
    rows = [
        r | {"variant": variant, "options": options}
        for variant, options in zip(variants, ("grid none", "grid 4"), strict=True)
        for r in GRID
    ]
    assert [found.name for found in build_maps(rows)] == names


def test_the_picture_is_the_maps_colours_in_its_places():
    """The lowest cell is dark and the highest light; a title of another's is no markup."""
    (found,) = build_maps(GRID)
    drawn = draw_heat_map(found, note=r"a $\frac{corpus$, 4 validation pairs")
    picture = np.asarray(Image.open(io.BytesIO(drawn)).convert("L")).astype(float)
    height, width = picture.shape
    ground = picture[int(0.55 * height), int(0.3 * width) : int(0.75 * width)]
    assert 900 < width < 3000
    assert ground.min() < 250
    top_left, bottom_right = (
        picture[: height // 2, : width // 2],
        picture[height // 2 :, width // 2 :],
    )
    assert np.median(top_left) < np.median(bottom_right[:, : width // 3])


def test_a_map_of_equal_values_is_drawn_too():
    (found,) = build_maps([row(6, 100, 0, 0.5)])
    assert draw_heat_map(found, note="").startswith(b"\x89PNG")
