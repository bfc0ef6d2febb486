"""Plans of corpora with captions, without masks and mixed, held against encoding them."""

import json
import random

import pytest

from pipeline.encode.actor_pool import ActorBounds
from pipeline.encode.prepare import prepare_encode
from pipeline.plan.compare import BYTES_WITHIN, compare
from pipeline.plan.run import PlanOptions, make_plan
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.stage.encode_stage import EncodeStage
from tests.support.web_tars import WebTar, describe, draw, draw_mask

WORDS = ("sky", "road", "tree", "car", "bus", "dog", "cat", "wall", "lamp", "door")
ZNET = TrainConfig(head=HeadConfig(name="znet"), num_steps=4, batch_size=2)
NUM_TARS, NUM_SAMPLES = 4, 16


def say_something(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 9)))


def add_captioned(tar, number, rng):
    """A sample as img2dataset writes it; one in four has a blank caption."""
    caption = say_something(rng) if number % 4 else ""
    picture = draw(number)
    others = {"json": describe(str(number), picture, caption), "txt": caption.encode()}
    tar.add(f"{number:06d}", picture, None, others)


def add_mixed(tar, number, rng):
    """Masks, an ignore region, negatives of its own; a caption; or nothing."""
    if number % 3 == 2:
        tar.add(f"{number:06d}", draw(number), None, {})
        return
    if number % 3 == 1:
        add_captioned(tar, number, rng)
        return
    own, others = rng.sample(WORDS, 3), {}
    document = {"phrases": own[:2], "negatives": own[2:], "uid": f"u{number}"}
    others = {"json": json.dumps(document).encode()}
    others |= {f"mask{i}.png": draw_mask() for i in range(2)}
    others |= {"ignore.png": draw_mask()} if number % 2 else {}
    tar.add(f"{number:06d}", draw(number), None, others)


def write_corpus(folder, add):
    rng = random.Random(0)
    for number in range(NUM_TARS):
        tar = WebTar()
        for i in range(NUM_SAMPLES):
            add(tar, number * NUM_SAMPLES + i, rng)
        tar.write(folder / f"x-{number}.tar")
    return str(folder / "x-*.tar")


def encode(spec, pattern, folder):
    run = prepare_encode(spec, [pattern], str(folder), batch=8)
    stage = EncodeStage(run.config)
    for item in run.items:
        outcome = stage.encode(item)
        assert outcome.status == "committed", outcome.error
    stage.close()


def plan_and_encode(spec, pattern, store, *, heads=()):
    """Return the forecast, and its figures beside those of a real run by name."""
    options = PlanOptions(
        corpus=(pattern,),
        spec=spec,
        heads=heads,
        required=False,
        actors=ActorBounds(0, 0),
        batch=8,
        num_samples=24,
    )
    forecast = make_plan(options, say=lambda _: None)
    encode(spec, pattern, store)
    return forecast, {row.what: row for row in compare(forecast, str(store), None)}


def check(rows, *, zero=()):
    for name in ("stored", "set_aside", "views", "pairs", "masks", "prompts"):
        if name in zero:
            assert rows[name].real == rows[name].forecast == 0
        else:
            assert rows[name].ratio == pytest.approx(1, abs=0.1), name
    assert rows["bytes"].ratio == pytest.approx(1, abs=BYTES_WITHIN)


@pytest.mark.parametrize("text", ["store", "none"])
def test_a_corpus_of_captions_is_forecast(text, ldm_folder, tmp_path):
    latents = LatentsSpec(model=str(ldm_folder), size=64, text=text, keep_json=("url",))
    pattern = write_corpus(tmp_path, add_captioned)
    spec = Spec(latents=latents)
    forecast, rows = plan_and_encode(spec, pattern, tmp_path / "store", heads=(ZNET,))
    check(rows, zero=("masks",))
    assert rows["bytes of latents text"].ratio == pytest.approx(1, abs=0.1)
    assert rows["bytes of latents mask"].ratio == pytest.approx(1, abs=0.1)  # its metadata
    assert (rows["prompts"].real == NUM_TARS) == (text == "none")
    assert "with a mask" in forecast.left_out["znet"]  # which has nothing to train on


@pytest.mark.thorough
def test_a_mixed_corpus_is_forecast(ldm_folder, tmp_path):
    latents = LatentsSpec(
        model=str(ldm_folder), size=64, crop="phrase", views=2, flip=True,
        negatives=2, prompts=("a {}.", "the {}"), keep_json=("uid",),
    )  # fmt: skip
    spec = Spec(latents=latents, features=FeaturesSpec(timesteps=(300,), blocks=(8,)))
    pattern = write_corpus(tmp_path, add_mixed)
    forecast, rows = plan_and_encode(spec, pattern, tmp_path / "store", heads=(ZNET,))
    check(rows)
    assert rows["bytes of latents mask"].ratio == pytest.approx(1, abs=0.1)
    assert rows["bytes of latents ignore"].ratio == pytest.approx(1, abs=0.1)
    assert rows["bytes of features block08"].ratio == pytest.approx(1, abs=0.1)
    (head,) = forecast.heads
    assert rows["masks"].real < head.pairs.value < rows["pairs"].real
