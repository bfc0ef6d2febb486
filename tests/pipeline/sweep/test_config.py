"""A sweep's file: axes crossed, variants laid over, what a head does not read left out."""

from pathlib import Path

import pytest

from pipeline.base.yaml import SpecError, load_yaml, parse_yaml
from pipeline.spec.fields import FeaturesSpec, Spec
from pipeline.sweep.config import SweepConfig

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"
SPEC = RECIPES / "heat-map-spec.yaml"
SPECS = {None: FeaturesSpec(blocks=(6, 7, 8), timesteps=(300, 400, 500))}


def read(text, *, base="head: {name: probe}, num_steps: 4"):
    return parse_yaml(f"base: {{{base}}}\n{text}", SweepConfig, where="sweep.yaml")


def list_configs(text, specs=SPECS, **options):
    return [trial.config for trial in read(text, **options).list_trials(specs)]


def test_without_axes_the_base_is_the_only_trial():
    sweep = read("")
    (trial,) = sweep.list_trials(SPECS)
    assert trial.config == sweep.base
    assert (trial.variant, trial.features) == ("base", None)


@pytest.mark.parametrize(("recipe", "num_trials"), [("sweep", 9), ("heat-map", 160)])
def test_the_recipes_are_sweeps(recipe, num_trials):
    config = load_yaml(RECIPES / f"{recipe}.yaml", SweepConfig)
    specs = {None: load_yaml(SPEC, Spec).features}
    assert len(config.list_trials(specs)) == num_trials


def test_axes_are_crossed_in_the_order_of_their_values():
    found = list_configs("axes: {seeds: [3, 1], learning_rate: [1.0e-3, 1.0e-4], num_steps: [9]}")
    got = [(config.learning_rate, config.seed, config.num_steps) for config in found]
    assert got == [(1e-3, 3, 9), (1e-3, 1, 9), (1e-4, 3, 9), (1e-4, 1, 9)]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("blocks: [[6, 7], [8]]", [(6, 7), (8,)]),
        ("blocks: {each: 6..8}", [(6,), (7,), (8,)]),
        ("blocks: {each: [8, 6]}", [(8,), (6,)]),
        ("blocks: {each: all}", [(6,), (7,), (8,)]),
    ],
)
def test_blocks_are_lists_or_one_a_trial(axis, expected):
    assert [config.head.blocks for config in list_configs(f"axes: {{{axis}}}")] == expected


def test_each_draw_that_is_stored():
    found = list_configs("axes: {draws: {each: all}}")
    assert [config.data.draws for config in found] == [(0,), (1,), (2,)]


def test_what_a_head_does_not_read_makes_no_trials_of_it():
    axes = "head: [znet, probe, ldznet], blocks: {each: 6..7}, draws: [[0], [1]]"
    found = list_configs(f"axes: {{{axes}, fusion: [attention, concatenation]}}")
    by_head = [config.head.name for config in found]
    assert [by_head.count(name) for name in ("znet", "probe", "ldznet")] == [1, 4, 8]
    assert found[0].data.draws is None


def test_layers_of_an_axis_are_called_by_their_names():
    sweep = read("axes: {features: {half: aaaa, whole: bbbb}, draws: {each: all}}")
    specs = {
        name: FeaturesSpec(blocks=(6,), timesteps=timesteps)
        for name, timesteps in (("aaaa", (300,)), ("bbbb", (300, 400)))
    }
    got = [
        (t.features, t.config.data.features, t.config.data.draws) for t in sweep.list_trials(specs)
    ]
    assert got == [("half", "aaaa", (0,)), ("whole", "bbbb", (0,)), ("whole", "bbbb", (1,))]
    assert sweep.list_layers() == ["aaaa", "bbbb"]


def test_variants_are_parts_laid_over_the_base():
    sweep = read(
        "variants: [{name: a, head: {name: znet}}, {name: b, num_steps: 9, data: {draws: [1]}}]\n"
        "axes: {seeds: [0, 1]}"
    )
    got = [(t.variant, t.config.head.name, t.config.num_steps) for t in sweep.list_trials(SPECS)]
    assert got == 2 * [("a", "znet", 4)] + 2 * [("b", "probe", 9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "axis: {}",
            r"axis: no such field; there are title, base, variants, axes, tests, heat_map",
        ),
        ("axes: {seed: [1]}", r"axes.seed: no such field; there are head,"),
        ("axes: {seeds: []}", r"axes.seeds: must be one or more values, none of them twice"),
        ("axes: {seeds: [1, 1]}", r"none of them twice, got \[1, 1\]"),
        ("axes: {blocks: {each: 9..6}}", r"FIRST at most LAST, got '9..6'"),
        ("axes: {draws: {each: [0, 0]}}", r"none of them twice"),
        ("axes: {head: [unet]}", r"axes.head.0: must be one of \['znet', 'ldznet', .* got 'unet'"),
        ("variants: [{name: a}, {name: a}]", r"different names, got \['a', 'a'\]"),
        ("variants: [{head: {name: znet}}]", r"variants.0.name: Field required"),
        ("axes: {width: [8, 8]}", r"axes.width: must be one or more values, none of them twice"),
        ("heat_map: true", r"heat_map needs one block and one draw a trial"),
    ],
)
def test_a_file_that_cannot_be_says_why(text, message):
    with pytest.raises(SpecError, match=message):
        read(text)


def test_a_trial_that_cannot_be_says_which():
    with pytest.raises(SpecError, match=r"variant 'a': .*\n.*head.nam: no such field"):
        list_configs("variants: [{name: a, head: {nam: znet}}]")
    with pytest.raises(SpecError, match=r"the trial of base with learning_rate -1.0"):
        list_configs("axes: {learning_rate: [-1.0]}")
    with pytest.raises(SpecError, match=r"warmup_steps must be below num_steps 1, got 2"):
        list_configs(
            "axes: {num_steps: [1]}", base="head: {name: znet}, num_steps: 4, warmup_steps: 2"
        )


def test_too_many_trials_are_a_mistake():
    axes = f"blocks: {{each: 1..1000}}, draws: {{each: 1..1000}}, seeds: {list(range(9))}"
    with pytest.raises(SpecError, match="expected at most 100000 trials a variant, got 9000000"):
        list_configs(f"axes: {{{axes}}}")
