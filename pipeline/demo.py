"""The main job whole, on an embedded default: draw, encode, train, evaluate, segment, report.

Everything lands under one folder. What is there already is not done again, so an interrupted demo
goes on where it was.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from models.tiny_ldm import write_tiny_ldm
from pipeline.checkpoint import list_checkpoints, load_checkpoint
from pipeline.encode import prepare_encode
from pipeline.encode_job import run_encode
from pipeline.evaluate import ScoredRow
from pipeline.evaluate_job import run_evaluate
from pipeline.inspect_store import inspect_store
from pipeline.ray_start import SPARE_CPUS, ray_running
from pipeline.report import Curve, Example, Report, ResultRow, write_report
from pipeline.scenes import Scene, draw_scene, words, write_corpus
from pipeline.segment import Segmenter
from pipeline.spec import Spec
from pipeline.train import METRICS
from pipeline.train_config import TrainConfig
from pipeline.train_job import run_train

HEADS = ("rgbnet", "znet", "ldznet")
TITLES = {"rgbnet": "RGBNet", "znet": "ZNet", "ldznet": "LD-ZNet"}
SEED = 0
MODEL_SEED = 2  # of 0 to 3, the random VAE whose latents tell red, green and blue best apart
CALIBRATION_IMAGES = 16
ENCODE_BATCH = 16
NOTES = (
    "The latent diffusion model has the real classes at reduced width and random weights: its "
    "features are a random projection, not the semantics that the paper finds in a trained one. "
    "The figures show that the whole road works, not what LD-ZNet can do.",
    "Everything foreground marks every pixel; each phrase's mean training mask ignores the image. "
    "AP of everything foreground is 0 because its precision-recall curve is a single point.",
    "Predictions are live: the same image encoded again without the store.",
)


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much of everything a demo does."""

    train_images: int
    validation_images: int
    images_per_tar: int
    num_steps: int
    num_examples: int


SIZES = {
    "default": DemoSize(400, 80, 80, 120, 8),
    "smallest": DemoSize(24, 12, 12, 6, 3),
}


@dataclass
class _Clock:
    """Seconds by stage, for the report."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start


@dataclass(frozen=True, slots=True)
class Demo:
    """A demo's folder, its size, and the spec and training config that it starts from."""

    out: Path
    size: DemoSize
    spec: Spec
    train: TrainConfig

    @property
    def store(self) -> str:
        """The store's folder."""
        return str(self.out / "store")

    @property
    def corpus(self) -> str:
        """The corpus pattern."""
        return str(self.out / "corpus" / "scenes-*.tar")


def run_demo(demo: Demo, *, say: Callable[[str], None]) -> Path:
    """Run the main job and return the report's path; ``say`` hears what starts.

    Raises:
        ValueError: ``demo.out`` holds another demo.
        RuntimeError: a task of the demo's own corpus failed to encode.
    """
    _check_folder(demo)
    clock = _Clock()
    say(f"drawing {demo.size.train_images + demo.size.validation_images} scenes, a tiny LDM")
    with clock.measure("draw corpus and model"):
        write_inputs(demo)
    with ray_running(num_cpus=(os.cpu_count() or 1) + SPARE_CPUS):
        say("encoding latents and features into " + demo.store)
        with clock.measure("encode"):
            encode_corpus(demo)
        for head in HEADS:
            say(f"training {head}")
            with clock.measure(f"train {head}"):
                train_head(demo, head)
    say("evaluating")
    rows: list[ScoredRow] = []
    with clock.measure("evaluate"):
        for head in HEADS:
            scored = run_evaluate(demo.store, demo.out / head)
            rows = [*rows, scored[0]] if rows else scored
    say("segmenting validation scenes live")
    with clock.measure("segment"):
        examples = segment_examples(demo)
    path = demo.out / "report.html"
    write_report(path, build_report(demo, rows, examples, clock.seconds))
    return path


def _check_folder(demo: Demo) -> None:
    """Note what this demo is, and refuse a folder that holds another one."""
    path = demo.out / "demo.json"
    text = json.dumps(
        {
            "size": asdict(demo.size),
            "spec": demo.spec.model_dump(mode="json"),
            "train": demo.train.model_dump(mode="json"),
        },
        indent=1,
    )
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{demo.out}: holds a demo of another size or version; remove the folder, or give "
            "another --out"
        )
    demo.out.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_inputs(demo: Demo) -> None:
    """Write the corpus, and the model where it is missing."""
    size = demo.size
    for split, num in (("train", size.train_images), ("val", size.validation_images)):
        write_corpus(
            demo.out / "corpus",
            split=split,
            num_images=num,
            images_per_tar=size.images_per_tar,
            seed=SEED,
            size_px=demo.spec.latents.size,
        )
    if not (demo.out / "ldm" / "model_index.json").exists():
        images = [_draw(demo, "train", index).image for index in range(CALIBRATION_IMAGES)]
        calibration = torch.from_numpy(np.stack(images))
        write_tiny_ldm(
            demo.out / "ldm", words=words(), seed=MODEL_SEED, calibration_BHWC=calibration
        )


def _draw(demo: Demo, split: str, index: int) -> Scene:
    return draw_scene(seed=SEED, split=split, index=index, size_px=demo.spec.latents.size)


def encode_corpus(demo: Demo) -> None:
    """Encode what is missing."""
    latents = demo.spec.latents.model_copy(update={"model": str(demo.out / "ldm")})
    spec = demo.spec.model_copy(update={"latents": latents})
    run = prepare_encode(spec, [demo.corpus], demo.store, batch=ENCODE_BATCH)
    totals = run_encode(run, metrics_path=demo.out / "encode" / METRICS)
    if totals.failures:
        raise RuntimeError(f"the demo's corpus failed to encode:\n{totals.describe()}")


def train_head(demo: Demo, head: str) -> None:
    """Train a head, go on with it, or leave it where it is done."""
    out = demo.out / head
    config = demo.train.model_copy(
        update={
            "head": demo.train.head.model_copy(update={"name": head}),
            "num_steps": demo.size.num_steps,
        }
    )
    begun = bool(list_checkpoints(out))
    if begun and load_checkpoint(out)[1].step == config.num_steps:
        return
    run_train(config, demo.store, out, num_workers=1, resume=begun)


def read_curve(demo: Demo, head: str) -> Curve:
    """Read a head's losses back from its ``metrics.jsonl``."""
    losses: dict[int, float] = {}  # by step: a head that was killed repeats some
    for line in (demo.out / head / METRICS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "loss" in record and "step" in record:
            losses[record["step"]] = record["loss"]
    return Curve(TITLES[head], sorted(losses), [losses[step] for step in sorted(losses)])


def segment_examples(demo: Demo) -> list[Example]:
    """Segment the first phrase of the first validation scenes with every head, live."""
    segmenters = {head: Segmenter(demo.out / head) for head in HEADS}
    examples = []
    for index in range(demo.size.num_examples):
        scene = _draw(demo, "val", index)
        predictions = {
            TITLES[head]: segmenter.segment(scene.image, scene.phrases[0])
            for head, segmenter in segmenters.items()
        }
        examples.append(Example(scene.image, scene.phrases[0], scene.masks[0], predictions))
    return examples


def build_report(
    demo: Demo, rows: Sequence[ScoredRow], examples: Sequence[Example], seconds: Mapping[str, float]
) -> Report:
    """Gather a run's figures, curves and pictures."""
    facts = {"command": f"ldznet demo --out {demo.out.name}"}
    for layer in inspect_store(demo.store):
        held = ", ".join(f"{count} {name}" for name, count in layer.rows.items())
        facts[layer.folder] = f"{held}, {layer.num_bytes / 1e6:.1f} MB"
    facts |= {stage: f"{value:.1f} s" for stage, value in seconds.items()}
    facts["in all"] = f"{sum(seconds.values()):.0f} s on {os.cpu_count()} cores"
    results = [
        ResultRow(
            TITLES.get(r.name, r.name), r.scores.mIoU, r.scores.IoU_FG, r.scores.AP, r.baseline
        )
        for r in rows
    ]
    return Report(
        title="ldznet demo",
        summary=(
            f"{demo.size.train_images} drawn scenes, encoded once by a tiny latent diffusion "
            "model; three heads trained from the store and scored on "
            f"{demo.size.validation_images} scenes never seen."
        ),
        facts=facts,
        results=sorted(results, key=lambda row: row.baseline),
        curves=[read_curve(demo, head) for head in HEADS],
        examples=examples,
        notes=NOTES,
    )
