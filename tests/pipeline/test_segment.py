"""Live segmentation: the cluster's values, the source's size, the right model or none."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.segment import segment
from models.ldm.files import ModelFilesError
from pipeline.base.yaml import SpecError
from pipeline.decode.images import decode_picture
from pipeline.read.reader import PairReader
from pipeline.runs.checkpoint import read_record, write_record
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.segment import Segmenter, cover_boxes, write_pictures
from pipeline.train.run import open_run_layers, run_train
from tests.support.icc import make_profile

CONFIG = TrainConfig(
    head=HeadConfig(name="ldznet"),
    num_steps=1,
    batch_size=2,
    validation_pairs=1,
    learning_rate=1e-3,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, store_folder):
    out = tmp_path_factory.mktemp("run")
    return run_train(CONFIG, str(store_folder), out, num_workers=0, resume=False)


@pytest.fixture(scope="module")
def segmenter(checkpoint):
    return Segmenter(checkpoint, device="cpu")


def test_live_features_are_the_cached_ones(segmenter, store_folder, corpus_folder):
    """The same image, phrase and key: what the cluster stored is what live encoding gives."""
    source = open_run_layers(CONFIG, str(store_folder), resume_from=None)
    inputs = frozenset({"latent", "text", "features"})
    reader = PairReader(source, tasks="*val*", inputs=inputs, blocks=(6, 7, 8, 9, 10))
    layers = {"latent": source.latents, "text": source.latents, "features": source.features}
    for number in (0, len(reader) - 1):
        cached = reader.read([number], draws=[reader.num_draws // 2])
        image = _read_image(corpus_folder, cached.keys[0])
        (live,) = segmenter.encode(image, cached.phrases[0], key=cached.keys[0])
        for name, layer in layers.items():
            ours, theirs = live.inputs[name], cached.inputs[name]
            pairs = (
                [(ours, theirs)] if name != "features" else [(ours[b], theirs[b]) for b in theirs]
            )
            for mine, stored in pairs:
                limit = layer.tolerance * stored.abs().max()
                assert (mine - stored).abs().max() <= limit, name


def test_live_features_are_of_the_draw_that_was_trained_on(checkpoint, store_folder, corpus_folder):
    segmenter = Segmenter(checkpoint, device="cpu")
    data = CONFIG.data.model_copy(update={"draws": (0,)})
    train = CONFIG.model_copy(update={"data": data})
    segmenter.record = segmenter.record.model_copy(update={"train": train})
    source = open_run_layers(CONFIG, str(store_folder), resume_from=None)
    reader = PairReader(source, tasks="*val*", inputs=frozenset({"features"}), blocks=(8,))
    cached = reader.read([0, 0], draws=[0, 1])
    image = _read_image(corpus_folder, cached.keys[0])
    (live,) = segmenter.encode(image, cached.phrases[0], key=cached.keys[0])
    ours, (first, second) = live.inputs["features"][8][0], cached.inputs["features"][8]
    limit = source.features.tolerance * first.abs().max()
    assert (ours - first).abs().max() <= limit
    assert (ours - second).abs().max() > limit


def test_the_empty_prompt_is_encoded_once_a_segmenter(checkpoint):
    segmenter = Segmenter(checkpoint, device="cpu")
    layer = segmenter.record.features
    section = {**layer.canonical["section"], "condition": "empty"}
    layer = layer.model_copy(update={"canonical": {**layer.canonical, "section": section}})
    segmenter.record = segmenter.record.model_copy(update={"features": layer})
    calls = []
    segmenter._latents.text_encoder.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    image = np.random.default_rng(0).integers(0, 256, (64, 300, 3), dtype=np.uint8)
    views = segmenter.encode(image, "circle")
    segmenter.encode(image, "square")
    assert len(views) > 2
    assert [prompts[0] for prompts in calls].count("") == 1


def _read_image(corpus_folder, key):
    import tarfile

    with tarfile.open(corpus_folder / "scenes-val-00000.tar") as tar:
        return np.array(
            decode_picture(tar.extractfile(f"{key}.jpg").read(), max_pixels=10**6).image
        )


def test_another_phrase_and_another_image_change_the_inputs(segmenter, corpus_folder):
    image = _read_image(corpus_folder, "val-000000")
    (first,) = segmenter.encode(image, "red circle")
    (second,) = segmenter.encode(image, "blue square")
    (third,) = segmenter.encode(image[::-1].copy(), "red circle")
    assert not torch.equal(first.inputs["text"], second.inputs["text"])
    assert torch.equal(first.inputs["latent"], second.inputs["latent"])
    assert not torch.equal(first.inputs["features"][8], second.inputs["features"][8])
    assert not torch.equal(first.inputs["latent"], third.inputs["latent"])


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (64, 300), (37, 41), (1, 5)])
def test_the_mask_has_the_sources_size(segmenter, size, tmp_path):
    height, width = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    probability = segmenter.segment(image, "circle")
    assert probability.shape == (height, width)
    assert probability.dtype == np.float32
    assert ((probability >= 0) & (probability <= 1)).all()
    share = write_pictures(
        image, probability, threshold=0.5, out=tmp_path / "m.png", overlay=tmp_path / "o.png"
    )
    with Image.open(tmp_path / "m.png") as mask, Image.open(tmp_path / "o.png") as overlay:
        assert mask.size == overlay.size == (width, height)
        assert (np.asarray(mask) > 0).mean() == pytest.approx(share)


@pytest.mark.parametrize(
    ("width", "height"), [(480, 360), (360, 480), (1000, 10), (7, 7), (361, 360)]
)
def test_views_cover_the_image_and_are_squares_of_its_shorter_side(width, height):
    covered = np.zeros((height, width), dtype=int)
    for box in cover_boxes(width, height, squeeze=False):
        assert box.right - box.left == box.bottom - box.top == min(width, height)
        assert box.left >= 0
        assert box.top >= 0
        covered[box.top : box.bottom, box.left : box.right] += 1
    assert covered.min() >= 1
    assert len(cover_boxes(width, height, squeeze=True)) == 1


def test_the_models_files_are_held_to_the_layers_digests(checkpoint, ldm_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(ldm_folder, moved)
    assert Segmenter(checkpoint, model=str(moved)).record.step == 1
    path = moved / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelFilesError, match=r"is not the model that features-.* was made with"):
        Segmenter(checkpoint, model=str(moved))


def test_bad_input_is_named(segmenter, tmp_path):
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="phrase: expected some text, got a blank"):
        segmenter.segment(image, "  ")
    with pytest.raises(SpecError, match="expected a checkpoint"):
        Segmenter(tmp_path)


def test_what_is_too_long_to_be_read_is_told_and_not_answered(segmenter, caplog):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    segmenter.segment(image, "red circle")
    assert not caplog.messages
    assert segmenter.shorten("red circle") == "red circle"
    words = [f"word{number}" for number in range(120)]
    phrase = " ".join(words)
    read = segmenter.shorten(phrase)
    assert phrase.startswith(read)
    assert 0 < len(read) < len(phrase)
    first = segmenter.segment(image, phrase)
    (message,) = caplog.messages
    assert "77 tokens" in message
    num_read = len(read.split())
    assert read.split() == words[:num_read]
    assert repr(" ".join(words[num_read:])) in message
    other = [*words[: num_read + 1], *words[:num_read]]  # of the next word a part may be read
    np.testing.assert_array_equal(segmenter.segment(image, " ".join(other)), first)
    other[num_read - 1] = "circle"
    assert not np.array_equal(segmenter.segment(image, " ".join(other)), first)
    assert segmenter.shorten("字" * 500) == "字" * len(segmenter.shorten("字" * 500)) != "字" * 500


def test_the_command_answers_what_was_read(checkpoint, tmp_path, capsys):
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    assert segment(checkpoint, picture, "circle " * 200 + "of the end", out=tmp_path / "m.png") == 0
    answer = capsys.readouterr().out
    assert "% of the image is 'circle circle" in answer
    assert "end" not in answer


@pytest.mark.parametrize(
    ("validated", "given", "said"),
    [
        (0.04, None, "over 0.04, the threshold of the best validation mIoU"),
        (0.04, 0.0, "over 0"),
        (0.98, None, "nothing is above 0.98; the highest probability is 0."),
        (None, None, "over 0.5, as the checkpoint has no validation that tells a better threshold"),
        (0.04, 1.0, "nothing is above 1; the highest probability is 0."),
    ],
)
def test_the_threshold_is_the_validations_unless_given(
    checkpoint, tmp_path, capsys, validated, given, said
):
    """And of an empty mask it is said what to try, which then marks something; so of a full one."""
    copied = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copied)
    figures = {} if validated is None else {"mIoU_threshold": validated}
    write_record(copied, read_record(copied).model_copy(update={"validation": figures}))
    picture, mask = tmp_path / "a.png", tmp_path / "m.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(picture)
    assert segment(copied, picture, "circle", out=mask, threshold=given) == 0
    answer = capsys.readouterr().out
    assert said in answer
    probability = Segmenter(copied, device="cpu").segment(np.array(Image.open(picture)), "circle")
    over = next(x for x in (given, validated, 0.5) if x is not None)
    np.testing.assert_array_equal(np.array(Image.open(mask)) == 255, probability > over)
    one_kind = (probability > over).all() or not (probability > over).any()
    assert ("try" in answer) == one_kind
    if one_kind:
        assert f"{probability.max():.2g}: try" in answer
        retry = float(answer.split("--threshold ")[1])
        assert segment(copied, picture, "circle", out=mask, threshold=retry) == 0
        assert "try" not in capsys.readouterr().out


def test_a_checkpoint_has_the_threshold_of_its_validation(checkpoint, segmenter):
    assert segmenter.threshold == read_record(checkpoint).validation["mIoU_threshold"] != 0.5


def test_an_image_is_read_as_its_layer_reads_it(checkpoint):
    """Turned by EXIF and of another colour space: by the spec of the latents layer."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", exif=exif, icc_profile=make_profile())
    segmenter = Segmenter(checkpoint, device="cpu")
    np.testing.assert_array_equal(segmenter.decode_image(out.getvalue()), np.rot90(pixels, -1))
    layer = segmenter.record.latents
    section = {**layer.canonical["section"], "orientation": "ignore", "color": "srgb"}
    layer = layer.model_copy(update={"canonical": {**layer.canonical, "section": section}})
    segmenter.record = segmenter.record.model_copy(update={"latents": layer})
    found = segmenter.decode_image(out.getvalue())
    expected = decode_picture(
        out.getvalue(), max_pixels=10**6, orientation="ignore", color="srgb"
    ).image
    np.testing.assert_array_equal(found, np.array(expected))
    assert found.shape == pixels.shape
    assert not np.array_equal(found, pixels)
