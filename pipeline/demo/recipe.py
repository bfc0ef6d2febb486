"""The demo's recipe and sizes, and the configs of its two sweeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.heads.registry import find_options_class
from pipeline.base.yaml import FrozenModel
from pipeline.read.choice import PairChoice
from pipeline.runs.config import TrainConfig
from pipeline.spec.fields import FeaturesSpec, LatentsSpec
from pipeline.sweep.config import Axes, Each, SweepConfig, TestSplit, Variant

HELD_OUT = "phrases held out"  # the tests' names in tables
RESTYLED = "another look"
MAP_PAIRS = 256  # that each probe of the heat map is scored on
MAP_TASKS = "scenes-train-0000[01]*"  # of the heat map's probes: a part is enough, and far cheaper


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much of everything a demo does."""

    train_images: int
    validation_images: int
    restyled_images: int
    images_per_tar: int
    num_steps: int | None  # of each head; None: as the recipe says
    probe_steps: int | None
    map_steps: int  # of each probe of the heat map
    map_blocks: tuple[int, ...] | None  # None: all
    map_draws: tuple[int, ...] | None
    num_seeds: int
    num_examples: int


SIZES = {
    "default": DemoSize(240, 120, 60, 60, None, None, 60, None, None, 3, 8),
    "smallest": DemoSize(24, 12, 12, 12, 4, 4, 4, (6, 8), (0, 2), 2, 3),
}


class DemoRecipe(FrozenModel):
    """The contents of ``demo.yaml``."""

    latents: LatentsSpec
    layers: dict[str, FeaturesSpec]  # by the names that variants use
    map_layer: FeaturesSpec
    held_out: str  # regular expression (RE2) of the phrases that no head is trained on
    restyled: str  # look of the second test corpus
    train: TrainConfig
    probe: dict[str, Any]  # part of a training config
    map_variants: dict[str, int | None]  # grid of the heat map's probes, by the map's name
    variants: tuple[Variant, ...]


def build_heads_sweep(
    recipe: DemoRecipe, size: DemoSize, layers: Mapping[str, str], latents: str
) -> SweepConfig:
    """Build the sweep of all variants over seeds, tested on held-out phrases and in another look.

    ``layers`` are the features layers' folders by name, ``latents`` the latents layer's.
    """
    variants = []
    for variant in recipe.variants:
        changes = dict(variant.model_extra or {})
        if not find_options_class(changes["head"]["name"]).starts_from_ldm:  # new and small
            steps = size.probe_steps or int(recipe.probe["num_steps"])
            changes |= recipe.probe | _fit_steps(recipe.train, steps)
        named = changes.get("data", {}).get("features")
        changes["data"] = {"features": layers[named] if named else None}
        variants.append(Variant(name=variant.name, **changes))
    base = _build_base(recipe, latents)
    steps = size.num_steps or recipe.train.num_steps
    base = base.model_copy(update=_fit_steps(recipe.train, steps))
    known = PairChoice(without_phrase=recipe.held_out)
    return SweepConfig(
        title="Heads on drawn scenes",
        base=base,
        variants=tuple(variants),
        axes=Axes(seeds=tuple(range(size.num_seeds))),
        tests={
            HELD_OUT: TestSplit(tasks="*val*", filter=PairChoice(phrase=recipe.held_out)),
            RESTYLED: TestSplit(tasks=f"*{recipe.restyled}*", filter=known),
        },
    )


def build_map_sweep(recipe: DemoRecipe, size: DemoSize, layer: str, latents: str) -> SweepConfig:
    """Build the sweep of a probe on each block at each timestep of the heat map's layer."""
    plain = _build_base(recipe, latents).model_dump(mode="json") | recipe.probe
    plain |= {"head": {"name": "probe"}, **_fit_steps(recipe.train, size.map_steps)}
    plain["validation_pairs"] = MAP_PAIRS
    plain["data"] |= {"features": layer, "train": MAP_TASKS}
    return SweepConfig(
        title="drawn scenes",
        base=TrainConfig.model_validate(plain),
        variants=tuple(
            Variant.model_validate({"name": name, "head": {"grid": grid}})
            for name, grid in recipe.map_variants.items()
        ),
        axes=Axes(
            blocks=Each(each=size.map_blocks or "all"),
            draws=Each(each=size.map_draws or "all"),
            seeds=(0,),
        ),
        heat_map=True,
    )


def _fit_steps(train: TrainConfig, num_steps: int) -> dict[str, int]:
    return {"num_steps": num_steps, "warmup_steps": min(train.warmup_steps, num_steps - 1)}


def _build_base(recipe: DemoRecipe, latents: str) -> TrainConfig:
    known = PairChoice(without_phrase=recipe.held_out)
    data = recipe.train.data.model_copy(
        update={"latents": latents, "train_filter": known, "validation_filter": known}
    )
    return recipe.train.model_copy(update={"data": data})
