"""A demo's report from what its sweeps and its encoding left.

Data flow: the rows of the heads' sweep -> a table by pairs scored on, and the paper's effects; the
rows of the probes -> the heat maps and what they say; times -> what the store saved.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.demo.recipe import HELD_OUT, RESTYLED, DemoRecipe, DemoSize
from pipeline.demo.savings import Savings
from pipeline.report.page import Curve, EffectRow, Example, Picture, Report, ResultRow
from pipeline.scenes.looks import LOOKS
from pipeline.scenes.scene import draw_scene
from pipeline.segment import Segmenter
from pipeline.sweep.config import VALIDATION
from pipeline.sweep.effects import Comparison, Effect, measure_effects
from pipeline.sweep.heat_map import HeatMap, build_maps
from pipeline.sweep.results import Row, Spread, group_rows, list_rows
from pipeline.sweep.run import SweepRun
from pipeline.sweep.trial import METRIC_NAMES
from pipeline.sweep.trials import SweepPlan
from pipeline.train.log import METRICS
from pipeline.upkeep.inspect import inspect_store

SHOWN = ("RGBNet", "ZNet", "LD-ZNet")  # variants with curves and examples
NO_PROMPT, UNIFORM = "probe, empty prompt", "probe, uniform draws"
GROUPS = {
    VALIDATION: "Known phrases, known look",
    HELD_OUT: "Phrases that no head was trained on",
    RESTYLED: "A look that nothing was trained on",
}
EVERY_OBJECT = "every object, whatever the phrase"
DOLLARS_A_CORE_HOUR = 0.05  # about what clouds ask for a core on demand
COMPARISONS = (
    Comparison("Does z beat RGB?", "ZNet", "RGBNet", VALIDATION),
    Comparison("… on new phrases?", "ZNet", "RGBNet", HELD_OUT),
    Comparison("… in another look?", "ZNet", "RGBNet", RESTYLED),
    Comparison("Do the UNet's features beat z alone?", "LD-ZNet", "ZNet", VALIDATION),
    Comparison("… on new phrases?", "LD-ZNet", "ZNet", HELD_OUT),
    Comparison("… in another look?", "LD-ZNet", "ZNet", RESTYLED),
    Comparison("Does the phrase get into the features?", "probe", NO_PROMPT, VALIDATION),
    Comparison("Does float16 beat int8?", "probe", "probe, int8", VALIDATION),
    Comparison(
        "Do fixed timesteps, to train and to score, beat uniform draws?",
        "probe",
        UNIFORM,
        VALIDATION,
    ),
)
NOTES = (
    "The latent diffusion model is Stable Diffusion 1's classes at a thirteenth of its width, "
    "trained on drawn scenes; its card is models/tiny_ldm_weights/README.md. What it shows of the "
    "paper's claims holds for it and these scenes.",
    "An effect is the mean difference of runs of equal seed, ± the sample standard deviation over "
    "seeds; the test pairs are the same for all. “Yes” takes a 95 % interval (Student's t, over "
    "seeds, for these pairs) clear of zero in both metrics; among "
    f"{len(COMPARISONS)} questions an answer in one metric alone may well be chance.",
    "Phrases that no head was trained on join a colour or texture and a shape that no training "
    "phrase joins; such objects are in the training images, and the diffusion model, from which "
    "all three heads start, has seen all combinations.",
    "Everything foreground marks every pixel; each phrase's mean training mask ignores the image; "
    "every object is the true mask of all objects, which a head has to beat by hearing the phrase. "
    "AP of everything foreground is 0 because its precision-recall curve is a single point.",
    "The examples are segmented live, from the drawings as they were before JPEG.",
)
RESULTS_NOTE = (
    "A probe reads features alone; its phrase is in them. “Int8”, “uniform draws” and “empty "
    "prompt” are features stored, drawn or conditioned otherwise. Fixed timesteps are scored at "
    "the middle one, uniform draws at drawn ones."
)


def segment_examples(recipe: DemoRecipe, plan: SweepPlan, *, seed: int, num: int) -> list[Example]:
    """Segment a phrase of the first ``num`` validation scenes, live, with each head's first seed.

    Every second scene is one of the restyled corpus.
    """
    segmenters = {name: Segmenter(folder) for name, folder in _list_shown(plan).items()}
    examples = []
    for number in range(num):
        split, look = (("val", "standard"), (recipe.restyled, recipe.restyled))[number % 2]
        scene = draw_scene(
            seed=seed,
            split=split,
            index=number // 2,
            size_px=recipe.latents.size,
            look=LOOKS[look],
        )
        phrase, truth = scene.phrases[0], scene.masks[0]
        predictions = {
            name: segmenter.segment(scene.image, phrase) for name, segmenter in segmenters.items()
        }
        examples.append(Example(scene.image, phrase, truth, predictions))
    return examples


def build_report(
    heads: SweepRun,
    mapped: SweepRun,
    examples: Sequence[Example],
    savings: Savings,
    objects: Mapping[str, tuple[float, float]],
    facts: Mapping[str, str],
) -> Report:
    """Gather a demo's tables, effects, curves and pictures."""
    rows = list_rows(heads.plan, heads.outcomes)
    maps = build_maps(list_rows(mapped.plan, mapped.outcomes))
    return Report(
        title="ldznet demo",
        summary=(
            "Drawn scenes, encoded once by a tiny latent diffusion model that was trained on such "
            f"scenes; {savings.num_heads} heads and probes trained from the store, and scored also "
            "on phrases that they did not know, and on scenes in a look that nothing has seen."
        ),
        facts=facts,
        results=list_results(rows, objects),
        results_note=RESULTS_NOTE,
        curves=list_curves(heads.plan),
        examples=examples,
        notes=NOTES,
        effects=[_show_effect(effect) for effect in measure_effects(rows, COMPARISONS)],
        pictures=[
            Picture(
                f"Which blocks and timesteps carry most: {found.name}",
                (mapped.plan.out / name).read_bytes(),
                "AP of probes by UNet block and timestep",
                describe_map(found),
            )
            for found, name in zip(maps, mapped.maps, strict=True)
        ],
        savings=describe_savings(savings),
    )


def describe_store(url: str) -> dict[str, str]:
    """What each layer of a store holds."""
    facts = {}
    for layer in inspect_store(url):
        held = ", ".join(f"{count} {name}" for name, count in layer.rows.items())
        facts[layer.folder] = f"{held}, {layer.num_bytes / 1e6:.1f} MB"
    return facts


def score_objects(
    recipe: DemoRecipe, size: DemoSize, *, seed: int
) -> dict[str, tuple[float, float]]:
    """mIoU and IoU_FG of whoever finds every object but hears no phrase, by what is scored.

    From the drawings: the mask of all objects that show, against that of each phrase.
    """
    parts = (
        (VALIDATION, "val", size.validation_images, False),
        (HELD_OUT, "val", size.validation_images, True),
        (RESTYLED, recipe.restyled, size.restyled_images, False),
    )
    scores = {}
    for scored_on, split, num, held_out in parts:
        overlaps, unions = [], []
        for index in range(num):
            scene = draw_scene(seed=seed, split=split, index=index, size_px=recipe.latents.size)
            found = scene.owner >= 0
            for phrase, mask in zip(scene.phrases, scene.masks, strict=True):
                if bool(re.search(recipe.held_out, phrase)) == held_out:
                    overlaps.append(np.count_nonzero(found & mask))
                    unions.append(np.count_nonzero(found | mask))
        each = np.array(overlaps) / np.array(unions)
        scores[scored_on] = float(each.mean()), sum(overlaps) / sum(unions)
    return scores


def list_results(
    rows: Sequence[Row], objects: Mapping[str, tuple[float, float]]
) -> list[ResultRow]:
    """Return the table's rows, by what they were scored on: variants, then the baselines.

    ``objects`` are ``score_objects``'.
    """
    results = []
    for scored_on, group in GROUPS.items():
        part = [row for row in rows if row["scored_on"] == scored_on]
        if part:
            group = f"{group}: {part[0]['num_pairs']} pairs"
        results += [_show_variant(row, spreads, group=group) for row, spreads in group_rows(part)]
        results += [
            ResultRow(
                row["head"], row["mIoU"], row["IoU_FG"], row["AP"], baseline=True, group=group
            )
            for row in part
            if row["seed"] is None
        ]
        if part:
            found = objects[scored_on]
            results.append(ResultRow(EVERY_OBJECT, *found, math.nan, baseline=True, group=group))
    return results


def _show_variant(row: Row, spreads: Mapping[str, Spread], *, group: str) -> ResultRow:
    mIoU, IoU_FG, AP = (spreads[name] for name in METRIC_NAMES)
    deviations = None
    if mIoU.deviation is not None and IoU_FG.deviation is not None and AP.deviation is not None:
        deviations = (mIoU.deviation, IoU_FG.deviation, AP.deviation)
    return ResultRow(
        row["variant"],
        mIoU.mean,
        IoU_FG.mean,
        AP.mean,
        group=group,
        deviations=deviations,
        seeds=AP.num,
    )


def _show_effect(effect: Effect) -> EffectRow:
    miou, ap = effect.spreads["mIoU"], effect.spreads["AP"]
    between = effect.comparison
    return EffectRow(
        question=between.question,
        compared=f"{between.ours} − {between.theirs}",
        mIoU=miou.mean,
        AP=ap.mean,
        mIoU_deviation=miou.deviation,
        AP_deviation=ap.deviation,
        seeds=ap.num,
        verdict=effect.verdict,
    )


def describe_map(found: HeatMap) -> str:
    """Say which block and which timestep have the highest AP, over the others."""
    defined = np.where((found.values >= 0) & (found.values <= 100), found.values, np.nan)
    by_block, by_timestep = np.nanmean(defined, axis=0), np.nanmean(defined, axis=1)
    blocks = np.argsort(by_block)[::-1][:3]
    best = int(np.argmax(by_timestep))
    listed = ", ".join(f"{found.blocks[i]} ({by_block[i]:.1f} %)" for i in blocks)
    return (
        f"Over all timesteps AP is highest at blocks {listed}; over all blocks at "
        f"t = {found.timesteps[best]} ({by_timestep[best]:.1f} %). One seed a cell."
    )


def list_curves(plan: SweepPlan) -> list[Curve]:
    """Read the losses of each shown head's first seed back from its ``metrics.jsonl``."""
    curves = []
    for name, folder in _list_shown(plan).items():
        losses = read_losses(folder / METRICS)
        steps = sorted(losses)
        curves.append(Curve(name, steps, [losses[step] for step in steps]))
    return curves


def _list_shown(plan: SweepPlan) -> dict[str, Path]:
    """Return the folder of each shown variant's first seed."""
    folders: dict[str, Path] = {}
    for trial in plan.trials:
        if trial.variant in SHOWN:
            folders.setdefault(trial.variant, plan.folder(trial))
    return folders


def read_losses(path: Path) -> dict[int, float]:
    """Losses by step; of steps that a killed run repeated, the last."""
    losses: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "loss" in record and "step" in record:
            losses[record["step"]] = record["loss"]
    return losses


def describe_savings(savings: Savings) -> dict[str, str]:
    """Say what the store cost and what recomputing would have, of this very run."""
    dollars = savings.saved_s / 3600 * DOLLARS_A_CORE_HOUR
    stored_s = savings.encode_s + savings.read_s
    return {
        "pairs read": f"{savings.num_reads:,} to train and validate {savings.num_heads} heads",
        "encoding, once": f"{savings.encode_s:.0f} s of a core: every core for as long as it took",
        "reading": f"{savings.read_s:.1f} s of a core",
        "recomputing instead": (
            f"{savings.recompute_s:.0f} s of a core: VAE, text encoder and UNet for each pair, at "
            "what a pair of each kind of head takes here"
        ),
        "saved": (
            f"{savings.saved_s:.0f} s of a core, {dollars:.4f} $ at {DOLLARS_A_CORE_HOUR} $ an "
            f"hour; recomputing is {savings.recompute_s / max(stored_s, 1e-9):.1f} times as much"
        ),
    }
