"""The demo's report, from the results of its two sweeps and the measured times.

Data flow: the rows of the heads' sweep -> a table of scores and the paper's effects; the rows of
the probes -> the heat maps; times -> what the store saved.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.demo.recipe import HELD_OUT, RESTYLED, DemoRecipe, DemoSize
from pipeline.demo.savings import Savings
from pipeline.evaluate.scoring import METRIC_NAMES
from pipeline.report.curves import Curve
from pipeline.report.page import Report
from pipeline.report.pictures import Example, Picture
from pipeline.report.tables import EffectRow, ResultRow
from pipeline.scenes.looks import LOOKS
from pipeline.scenes.scene import draw_scene
from pipeline.segment import Segmenter
from pipeline.sweep.config import VALIDATION
from pipeline.sweep.effects import Contrast, measure_effects
from pipeline.sweep.heat_map import HeatMap, build_maps
from pipeline.sweep.results import Row, group_rows, list_rows
from pipeline.sweep.run import SweepRun
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
CONTRASTS = (
    Contrast("Does z beat RGB?", "ZNet", "RGBNet", VALIDATION),
    Contrast("… on new phrases?", "ZNet", "RGBNet", HELD_OUT),
    Contrast("… in another look?", "ZNet", "RGBNet", RESTYLED),
    Contrast("Do the UNet's features beat z alone?", "LD-ZNet", "ZNet", VALIDATION),
    Contrast("… on new phrases?", "LD-ZNet", "ZNet", HELD_OUT),
    Contrast("… in another look?", "LD-ZNet", "ZNet", RESTYLED),
    Contrast("Does the phrase get into the features?", "probe", NO_PROMPT, VALIDATION),
    Contrast("Does float16 beat int8?", "probe", "probe, int8", VALIDATION),
    Contrast(
        "Do fixed timesteps, to train and to score, beat uniform draws?",
        "probe",
        UNIFORM,
        VALIDATION,
    ),
)
NOTES = (
    "The latent diffusion model is Stable Diffusion 1's classes at a thirteenth of its width, "
    "trained on drawn scenes; its card is models/tiny_ldm_weights/README.md. What it shows of the "
    "paper's claims holds for this model and these scenes.",
    "The answer to an effect is “yes” where the 95 % interval of the mean difference (Student's t, "
    "over seeds, for these test pairs) is clear of zero in both metrics. Among "
    f"{len(CONTRASTS)} questions, an answer in one metric alone may well be chance.",
    "Phrases that no head was trained on join a colour or texture with a shape that no training "
    "phrase joins it with. Such objects are in the training images, and the diffusion model, from "
    "which all three heads start, has seen all combinations.",
    "“Everything foreground” marks every pixel; its AP is the share of the masks. “Phrase's mean "
    "training mask” ignores the image. “Every object” is the true mask of all objects: a head has "
    "to use the phrase to beat it.",
)
RESULTS_NOTE = (
    "Each head was trained with {} seeds. A probe reads features alone; its phrase is in them. "
    "“Int8”, “uniform draws” and “empty prompt” are features stored, drawn or conditioned "
    "otherwise. Heads on fixed timesteps are scored at the middle one, uniform draws at drawn ones."
)


def segment_examples(recipe: DemoRecipe, plan: SweepPlan, *, seed: int, num: int) -> list[Example]:
    """Segment the first phrase of ``num`` test scenes, live, with each head's first seed.

    Validation scenes and scenes of the restyled corpus take turns.
    """
    segmenters = {name: Segmenter(folder) for name, folder in _list_shown(plan).items()}
    thresholds = {name: s.threshold for name, s in segmenters.items()}
    examples = []
    for number in range(num):
        split, look = (("val", "standard"), (recipe.restyled, recipe.restyled))[number % 2]
        size_px, index = recipe.latents.size, number // 2
        scene = draw_scene(seed=seed, split=split, index=index, size_px=size_px, look=LOOKS[look])
        phrase = scene.phrases[0]
        predictions = {name: s.segment(scene.image, phrase) for name, s in segmenters.items()}
        examples.append(Example(scene.image, phrase, scene.masks[0], predictions, thresholds))
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
    rows = list_rows(heads.plan, heads.results)
    maps = build_maps(list_rows(mapped.plan, mapped.results))
    return Report(
        title="ldznet demo",
        summary=(
            "Drawn scenes, encoded once by a tiny latent diffusion model that was trained on such "
            f"scenes; {savings.num_heads} heads and probes trained from the store, and scored also "
            "on phrases that they did not know, and on scenes in a look that nothing has seen."
        ),
        facts=facts,
        results=list_results(rows, objects),
        results_note=RESULTS_NOTE.format(len({row["seed"] for row in rows} - {None})),
        curves=[Curve(n, read_losses(f / METRICS)) for n, f in _list_shown(heads.plan).items()],
        examples=examples,
        notes=NOTES,
        effects=[
            EffectRow(
                question=found.contrast.question,
                compared=f"{found.contrast.ours} − {found.contrast.theirs}",
                differences=(found.spreads["mIoU"].mean, found.spreads["AP"].mean),
                deviations=(found.spreads["mIoU"].deviation, found.spreads["AP"].deviation),
                verdict=found.verdict,
            )
            for found in measure_effects(rows, CONTRASTS)
        ],
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
    """Return the row counts and size of each layer of a store, by its folder."""
    facts = {}
    for layer in inspect_store(url):
        held = ", ".join(f"{count} {name}" for name, count in layer.rows.items())
        facts[layer.folder] = f"{held}, {layer.num_bytes / 1e6:.1f} MB"
    return facts


def score_objects(
    recipe: DemoRecipe, size: DemoSize, *, seed: int
) -> dict[str, tuple[float, float]]:
    """Return mIoU and IoU_FG of the baseline "every object", by the pairs that are scored.

    Whatever the phrase, it predicts the mask of all visible objects of the scene.
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
    """Return the table's rows by what they were scored on: variants, then the baselines.

    ``objects`` are the scores of ``score_objects``.
    """
    results = []
    for scored_on, title in GROUPS.items():
        part = [row for row in rows if row["scored_on"] == scored_on]
        if not part:
            continue
        group = f"{title}: {part[0]['num_pairs']} pairs"
        for row, spreads in group_rows(part):
            found = [spreads[name] for name in METRIC_NAMES]
            means, deviations = tuple(s.mean for s in found), tuple(s.deviation for s in found)
            at = spreads["mIoU_threshold"].mean
            results.append(ResultRow(row["variant"], means, deviations, False, group, at))
        for row in part:
            if row["seed"] is None:
                scores = tuple(row[name] for name in METRIC_NAMES)
                none, at = (None,) * len(scores), row["mIoU_threshold"]
                results.append(ResultRow(row["head"], scores, none, True, group, at))
        every = (*objects[scored_on], math.nan)
        results.append(ResultRow(EVERY_OBJECT, every, baseline=True, group=group))
    return results


def describe_map(found: HeatMap) -> str:
    """Say which blocks and which timestep have the highest AP, averaged over the others."""
    by_block, by_timestep = np.nanmean(found.values, axis=0), np.nanmean(found.values, axis=1)
    blocks = np.argsort(by_block)[::-1][:3]
    best = int(np.argmax(by_timestep))
    listed = ", ".join(f"{found.blocks[i]} ({by_block[i]:.1f} %)" for i in blocks)
    return (
        f"Over all timesteps AP is highest at blocks {listed}; over all blocks at "
        f"t = {found.timesteps[best]} ({by_timestep[best]:.1f} %)."
    )


def _list_shown(plan: SweepPlan) -> dict[str, Path]:
    """Return the folder of each shown variant's first seed."""
    folders: dict[str, Path] = {}
    for trial in plan.trials:
        if trial.variant in SHOWN:
            folders.setdefault(trial.variant, plan.folder(trial))
    return folders


def read_losses(path: Path) -> dict[int, float]:
    """Read the losses by step from a ``metrics.jsonl``; of steps logged twice, the last."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {r["step"]: r["loss"] for r in records if "loss" in r and "step" in r}


def describe_savings(savings: Savings) -> dict[str, str]:
    """Say what the store cost in this run, and what recomputing would have cost."""
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
