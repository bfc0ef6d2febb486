"""The whole job on an embedded corpus: draw, encode, train, score, segment, report.

Data flow: drawn scenes, some in a look that nothing was trained on -> latents and five features
layers, by the bundled tiny latent diffusion model -> two sweeps over the store: heads by seeds, and
a probe on each block at each timestep -> a report. What the folder holds already is not done again,
so an interrupted demo continues where it was.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from models.tiny.architecture import BUNDLED
from pipeline.base.ray_cluster import ray_running
from pipeline.base.whole_file import write_whole
from pipeline.demo.recipe import DemoRecipe, DemoSize, build_heads_sweep, build_map_sweep
from pipeline.demo.report import build_report, describe_store, score_objects, segment_examples
from pipeline.demo.savings import measure_savings
from pipeline.encode.actor_pool import ActorBounds
from pipeline.encode.prepare import prepare_encode
from pipeline.encode.run import run_encode
from pipeline.report.page import write_report
from pipeline.scenes.looks import LOOKS
from pipeline.scenes.scene import write_corpus
from pipeline.spec.fields import Spec
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.run import SweepRun, open_sweep, run_sweep
from pipeline.train.log import METRICS

SEED = 0  # of the scenes; those that the model was trained on have another
ENCODE_BATCH = 16
MAP_LAYER = "every block"
ENCODE = "encode"
Say = Callable[[str], None]


class StageTimes:
    """Seconds by stage, summed over all runs of a demo and kept in a file."""

    def __init__(self, path: Path) -> None:
        """Start from the seconds that earlier runs left in the file."""
        self._path = path
        self.seconds: dict[str, float] = {}
        if path.exists():
            self.seconds = json.loads(path.read_text(encoding="utf-8"))

    @contextmanager
    def measure(self, stage: str, *, again: bool = False) -> Iterator[None]:
        """Add the time of the ``with`` block to a stage's, also where it is interrupted.

        With ``again``, for a stage that every run repeats, it replaces the time of earlier runs.
        """
        start = time.monotonic()
        before = 0.0 if again else self.seconds.get(stage, 0.0)
        try:
            yield
        finally:
            self.seconds[stage] = before + time.monotonic() - start
            write_whole(self._path, json.dumps(self.seconds, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Demo:
    """What a demo does, how much of it, and in which folder."""

    out: Path
    size: DemoSize
    recipe: DemoRecipe
    command: str = "ldznet demo"  # that the report names

    @property
    def store(self) -> str:
        """The store's folder."""
        return str(self.out / "store")


def run_demo(demo: Demo, *, say: Say) -> Path:
    """Run the whole job and return the report's path; ``say`` is called with what starts.

    Raises:
        ValueError: ``demo.out`` holds another demo.
        RuntimeError: a task of the demo's own corpus failed to encode, or a head to train.
    """
    _check_folder(demo)
    times, size, recipe = StageTimes(demo.out / "seconds.json"), demo.size, demo.recipe
    say(f"drawing {size.train_images + size.validation_images + size.restyled_images} scenes")
    with times.measure("draw the corpus"):
        write_scenes(demo)
    with ray_running():
        latents, layers = encode_layers(demo, times, say)
        heads = build_heads_sweep(recipe, size, layers, latents)
        with times.measure("train and score heads"):
            trained = _run_sweep(demo, heads, "heads", say)
        probes = build_map_sweep(recipe, size, layers[MAP_LAYER], latents)
        with times.measure("probes of the heat map"):
            mapped = _run_sweep(demo, probes, "heat-map", say)
    say("segmenting test scenes live, timing a pair read from the store and computed without it")
    with times.measure("segment, and time a pair", again=True):
        examples = segment_examples(recipe, trained.plan, seed=SEED, num=size.num_examples)
        savings = measure_savings(
            [trained.plan, mapped.plan],
            features=mapped.plan.layers[layers[MAP_LAYER]],
            encode_s=times.seconds[ENCODE] * (os.cpu_count() or 1),
        )
    facts = {"command": demo.command, **describe_store(demo.store)}
    facts |= {stage: f"{value:.1f} s" for stage, value in times.seconds.items()}
    facts["in all"] = f"{sum(times.seconds.values()):.0f} s on {os.cpu_count()} cores"
    path = demo.out / "report.html"
    objects = score_objects(recipe, size, seed=SEED)
    write_report(path, build_report(trained, mapped, examples, savings, objects, facts))
    return path


def _check_folder(demo: Demo) -> None:
    """Write down what this demo is, and refuse a folder that holds another one."""
    path = demo.out / "demo.json"
    model = hashlib.sha256()
    for weights in sorted(BUNDLED.rglob("*.safetensors")):
        model.update(weights.read_bytes())
    plain = {
        "size": asdict(demo.size),
        "recipe": demo.recipe.model_dump(mode="json"),
        "model": model.hexdigest(),
    }
    text = json.dumps(plain, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{demo.out}: holds a demo of another size or version; remove the folder, or give "
            "another --out"
        )
    demo.out.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def write_scenes(demo: Demo) -> None:
    """Write the corpora that are missing: training, validation, and one in another look."""
    size, restyled = demo.size, demo.recipe.restyled
    parts = [("train", size.train_images, "standard"), ("val", size.validation_images, "standard")]
    for split, num_images, look in [*parts, (restyled, size.restyled_images, restyled)]:
        write_corpus(
            demo.out / "corpus",
            split=split,
            num_images=num_images,
            images_per_tar=size.images_per_tar,
            seed=SEED,
            size_px=demo.recipe.latents.size,
            look=LOOKS[look],
            keep=True,
        )


def encode_layers(demo: Demo, times: StageTimes, say: Say) -> tuple[str, dict[str, str]]:
    """Encode what is missing: the first layer with its latents on Ray, the others in this process.

    These use one thread: with batches so small a second one takes longer (16 s and 19 s for 850
    pairs of 3 draws), and an actor takes longer to start.

    Returns:
        The latents layer's folder, and the features layers' folders by name.
    """
    latents = demo.recipe.latents.model_copy(update={"model": str(BUNDLED)})
    corpus = str(demo.out / "corpus")
    folders: dict[str, str] = {}
    latents_folder = ""
    for name, features in {**demo.recipe.layers, MAP_LAYER: demo.recipe.map_layer}.items():
        wanted = f"scenes-{'{train-0000[01],val-0000[01]}' if name == MAP_LAYER else '*'}.tar"
        spec = Spec(latents=latents, features=features)
        run = prepare_encode(spec, [f"{corpus}/{wanted}"], demo.store, batch=ENCODE_BATCH)
        assert run.config.features is not None
        latents_folder, folders[name] = run.config.latents.folder, run.config.features.folder
        say(f"encoding the layer {name!r}: {run.num_tasks - run.num_done} of {run.num_tasks} tars")
        on_ray = len(folders) == 1
        with times.measure(ENCODE):
            totals = run_encode(
                run,
                metrics_path=demo.out / "encode" / name.replace(" ", "-") / METRICS,
                actors=None if on_ray else ActorBounds(0, 0),
                num_threads=None if on_ray else 1,
            )
        if totals.failures:
            raise RuntimeError(f"the demo's corpus failed to encode:\n{totals.describe()}")
    return latents_folder, folders


def _run_sweep(demo: Demo, config: SweepConfig, name: str, say: Say) -> SweepRun:
    with open_sweep(config, demo.store, demo.out / name) as plan:
        say(f"training {len(plan.trials) - 1} heads")
        run = run_sweep(plan, at_once=os.cpu_count())
    if run.failures:
        raise RuntimeError(f"the demo's heads failed:\n{run.describe()}")
    return run
