import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.ldm.encoders import FeatureEncoder, LatentEncoder
from models.tiny.untrained import build_vae
from pipeline.base.yaml import SpecError
from pipeline.pretrain import card as pretrain_card
from pipeline.pretrain.config import LdmConfig, LdmPhase, PretrainConfig
from pipeline.pretrain.encode import write_start
from pipeline.pretrain.export import load_start
from pipeline.pretrain.ldm import LdmObjective, open_phases
from pipeline.pretrain.run import run_pretrain
from pipeline.pretrain.vae import train_vae
from pipeline.runs.lock import RunHeldError, RunLock
from pipeline.scenes.scene import draw_scene

pytestmark = pytest.mark.thorough

FITTING = {"warmup_steps": 1, "log_every": 1, "validate_every": 4, "checkpoint_every": 2}
CONFIG = PretrainConfig.model_validate(
    {
        "corpus": {"num_train": 6, "num_validation": 2, "images_per_tar": 6, "size": 64},
        "vae": {"num_steps": 4, "batch_size": 2, "crop": 32, "learning_rate": 1e-3, **FITTING},
        "ldm": {
            "phases": [
                {"size": 64, "num_steps": 2, "batch_size": 4},
                {"size": 64, "num_steps": 2, "batch_size": 2, "snr_floor": 0.25},
            ],
            "learning_rate": 1e-3,
            **FITTING,
        },
        "card": {"num_scenes": 1, "num_samples": 1, "num_steps": 1},
    }
)


def read_records(out, stage):
    lines = (out / stage / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k != "steps_per_s"} for record in records]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain")
    said = []
    folder = run_pretrain(CONFIG, out, stage="all", resume=False, say=said.append)
    assert folder == out / "tiny_ldm"
    return out


def test_model_loads_with_plain_diffusers_and_ours(pretrained):
    folder = pretrained / "tiny_ldm"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert pipeline.unet.config.cross_attention_dim == 64
    ours = LatentEncoder.from_pretrained(folder)
    image = torch.from_numpy(draw_scene(seed=0, split="train", index=0, size_px=64).image)
    mean, _ = ours.encode_image(image[None])
    text = ours.encode_text(["a photo of a red circle."]).tokens
    features = FeatureEncoder.from_pretrained(folder, blocks=(7, 8))
    found = features.encode_features(
        mean * ours.scaling_factor, torch.zeros_like(mean), torch.tensor([300]), text
    )
    assert {number: tuple(f.shape[1:]) for number, f in found.items()} == features.list_shapes(
        (8, 8)
    )
    assert all(f.isfinite().all() and f.std() > 0 for f in found.values())


def test_weights_are_the_averages_in_half_precision(pretrained):
    stored = load_file(pretrained / "tiny_ldm" / "unet" / "diffusion_pytorch_model.safetensors")
    trained = load_file(pretrained / "ldm" / "step-000004" / "average.safetensors")
    assert all(value.dtype == torch.float16 for value in stored.values())
    for name, value in stored.items():
        torch.testing.assert_close(value, trained[f"unet.{name}"].half(), rtol=0, atol=0)


def test_the_decoder_is_the_trained_vae(pretrained):
    vae = AutoencoderKL.from_pretrained(pretrained / "tiny_ldm", subfolder="vae")
    trained = load_file(pretrained / "vae" / "step-000004" / "average.safetensors")
    name = "decoder.conv_in.weight"
    torch.testing.assert_close(vae.state_dict()[name], trained[name].half().float())
    latents = vae.config.scaling_factor
    assert 0.05 < latents < 20


def test_card_gives_figures_and_a_sheet(pretrained):
    folder = pretrained / "tiny_ldm"
    figures = json.loads((folder / "figures.json").read_text())
    assert set(figures["psnr_dB"]) >= {"standard", "woven"}
    assert len(figures["denoising_loss"]) == 11
    card = (folder / "README.md").read_text()
    assert "Nobody has looked yet" in card
    assert f"| {figures['psnr_dB']['woven']:.1f} | no |" in card
    assert (folder / "sheet.png").stat().st_size > 1000
    (pretrained / "notes.md").write_text("Rings come out as circles.\n")
    run_pretrain(CONFIG, pretrained, stage="card", resume=True, say=lambda text: None)
    assert "Rings come out as circles." in (folder / "README.md").read_text()


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_a_killed_run_goes_on_as_the_undisturbed_one(pretrained, tmp_path, stage):
    """Killed after step 3, whose records were written, with a checkpoint of step 2 alone."""
    out = shutil.copytree(pretrained, tmp_path / "killed")
    shutil.rmtree(out / stage / "step-000004")
    metrics = out / stage / "metrics.jsonl"
    lines = [x for x in metrics.read_text().splitlines(keepends=True) if '"step": 4' not in x]
    metrics.write_text("".join(lines) + '{"step": 4, "lo')
    run_pretrain(CONFIG, out, stage=stage, resume=True, say=lambda text: None)
    assert read_records(out, stage) == read_records(pretrained, stage)
    ours, theirs = (
        load_file(folder / stage / "step-000004" / "average.safetensors")
        for folder in (out, pretrained)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_is_there_is_not_begun_anew(pretrained):
    with pytest.raises(SpecError, match=r"holds a run at step 4; give --resume"):
        run_pretrain(CONFIG, pretrained, stage="vae", resume=False, say=lambda text: None)


def change(stage, **update):
    old = getattr(CONFIG, stage)
    return CONFIG.model_copy(update={stage: old.model_copy(update=update)})


def test_another_config_is_refused(pretrained):
    other = change("vae", weight_decay=0.5, num_steps=9)
    with pytest.raises(SpecError, match=r"another config: weight_decay was 0.01, is 0.5; give"):
        run_pretrain(other, pretrained, stage="vae", resume=True, say=lambda text: None)


def test_a_run_that_diverged_goes_on_with_a_lower_rate(pretrained, tmp_path):
    out = shutil.copytree(pretrained, tmp_path / "diverged")
    shutil.rmtree(out / "vae" / "step-000004")
    state = out / "vae" / "step-000002" / "training.safetensors"
    good = state.read_bytes()
    weights = load_file(state)
    name = next(x for x in weights if x.endswith("decoder.conv_in.weight"))
    save_file(weights | {name: weights[name] * float("nan")}, state)
    with pytest.raises(
        FloatingPointError, match=r"step \d: loss nan.* Lower learning_rate and give --res"
    ):
        run_pretrain(CONFIG, out, stage="vae", resume=True, say=lambda text: None)
    state.write_bytes(good)
    lower = change("vae", learning_rate=1e-4)
    run_pretrain(lower, out, stage="vae", resume=True, say=lambda text: None)
    assert read_records(out, "vae")[-2]["learning_rate"] <= 1e-4


def test_a_folder_is_of_one_corpus(pretrained):
    before = sorted(pretrained.rglob("*.tar"))
    more = change("corpus", num_train=12)
    with pytest.raises(SpecError, match=r"corpus is another: num_train was 6, is 12; give its"):
        run_pretrain(more, pretrained, stage="corpus", resume=True, say=lambda text: None)
    assert sorted(pretrained.rglob("*.tar")) == before


def test_a_vae_is_encoded_with_when_it_is_done_and_not_changed_after(pretrained):
    longer = change("vae", num_steps=9)
    with pytest.raises(SpecError, match=r"expected a VAE of 9 steps, got 4; run --stage vae --res"):
        run_pretrain(longer, pretrained, stage="encode", resume=True, say=lambda text: None)
    images, vae = np.zeros((1, 64, 64, 3), np.uint8), build_vae(0)
    with pytest.raises(SpecError, match=r"made from the VAE's step 4, which is now at 9; remove"):
        write_start(pretrained / "start", vae, images, seed=0, vae_step=9)


@pytest.mark.parametrize(
    ("step", "phases", "message"),
    [
        (3, [(2, 4), (2, 2)], None),
        (3, [(2, 4), (9, 2)], None),
        (3, [(2, 4), (1, 2)], None),  # ends where it is
        (2, [(2, 4)], None),
        (2, [(2, 4), (7, 9)], None),  # had not begun
        (4, [(2, 4), (2, 2), (5, 8)], None),
        (
            3,
            [(1, 4), (2, 2)],
            r"phases\[0\] had begun by step 3: .*num_steps=2.* got .*num_steps=1",
        ),
        (3, [(2, 8), (2, 2)], r"phases\[0\]"),
        (3, [(2, 4), (2, 1)], r"phases\[1\] had begun .* another num_steps of at least 1, got"),
        (5, [(2, 4), (2, 2)], r"phases\[1\] .* at least 3"),
        (3, [(3, 4)], r"phases\[0\]"),
        (1, [(9, 4)], None),
        (4, [(2, 4)], r"phases\[1\] .* got None"),
    ],
)
def test_phases_that_had_begun_stay(step, phases, message):
    def build(numbers):
        named = [{"size": 64, "num_steps": num, "batch_size": size} for num, size in numbers]
        return LdmConfig(phases=named, learning_rate=1e-3)

    earlier = build([(2, 4), (3, 2)])
    if message is None:
        build(phases).check_begun(earlier, step)
    else:
        with pytest.raises(ValueError, match=message):
            build(phases).check_begun(earlier, step)


@pytest.mark.parametrize("stage", ["ldm", "card"])
def test_other_phases_than_those_taken_are_refused(pretrained, stage):
    first, second = CONFIG.ldm.phases
    other = change("ldm", phases=(first.model_copy(update={"batch_size": 8}), second))
    with pytest.raises(SpecError, match=r"step-000004: phases\[0\] had begun .* or another --out"):
        run_pretrain(other, pretrained, stage=stage, resume=True, say=lambda text: None)


def test_a_card_that_fails_leaves_the_last_one(pretrained, monkeypatch):
    before = {
        x: x.read_bytes() for x in sorted((pretrained / "tiny_ldm").rglob("*")) if x.is_file()
    }

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(pretrain_card, "format_card", fail)
    with pytest.raises(OSError, match="no space left"):
        run_pretrain(CONFIG, pretrained, stage="card", resume=True, say=lambda text: None)
    after = {x: x.read_bytes() for x in sorted((pretrained / "tiny_ldm").rglob("*")) if x.is_file()}
    assert after == before
    assert not list(pretrained.glob(".*new*"))


def test_a_floor_weighs_the_steps_of_its_phase_alone(pretrained):
    plain = CONFIG.ldm.model_copy(
        update={
            "phases": tuple(x.model_copy(update={"snr_floor": None}) for x in CONFIG.ldm.phases)
        }
    )
    model = load_start(pretrained / "start").eval()
    losses = {}
    for name, config in (("floor", CONFIG.ldm), ("plain", plain)):
        task = LdmObjective(
            config, open_phases(str(pretrained / "store"), config), torch.device("cpu")
        )
        losses[name] = [task.compute_losses(model, step) for step in range(CONFIG.ldm.num_steps)]
    pairs = list(zip(losses["floor"], losses["plain"], strict=True))
    assert all(ours["error"] == theirs["error"] for ours, theirs in pairs)
    assert [bool(ours["loss"] > theirs["loss"]) for ours, theirs in pairs] == [False] * 2 + [
        True
    ] * 2


def test_phases_of_a_size_read_the_same_scenes():
    phases = [{"size": 64, "num_steps": 1, "batch_size": 1, "num_tars": n} for n in (1, None)]
    with pytest.raises(ValidationError, match=r"64 px .* same num_tars, got 1 and None"):
        LdmConfig(phases=phases, learning_rate=1e-3)


def test_a_run_goes_on_with_a_phase_more(pretrained, tmp_path):
    out = shutil.copytree(pretrained, tmp_path / "longer")
    added = LdmPhase(size=64, num_steps=1, batch_size=2, snr_floor=1.0)
    ldm = CONFIG.ldm.model_copy(update={"phases": (*CONFIG.ldm.phases, added)})
    longer = CONFIG.model_copy(update={"ldm": ldm})
    run_pretrain(longer, out, stage="ldm", resume=True, say=lambda text: None)
    assert [x["step"] for x in read_records(out, "ldm") if "loss" in x] == [1, 2, 3, 4, 5]
    run_pretrain(longer, out, stage="card", resume=True, say=lambda text: None)
    card = " ".join((out / "tiny_ldm" / "README.md").read_text().split())
    assert "then 1 of 2 pairs at 64 px with SNR at least 1 in the weights" in card


def test_no_such_stage(tmp_path):
    with pytest.raises(SpecError, match=r"expected one of corpus, vae, encode, ldm, card or all"):
        run_pretrain(CONFIG, tmp_path, stage="unet", resume=False, say=lambda text: None)


def test_images_are_cached_whole(pretrained):
    images = np.load(pretrained / "images-train.npy")
    assert images.shape == (6, 64, 64, 3)
    assert images.std(axis=(1, 2, 3)).min() > 1


def test_training_the_vae_lowers_its_loss(pretrained, tmp_path):
    images = np.load(pretrained / "images-train.npy")
    vae = CONFIG.vae.model_copy(
        update={"num_steps": 16, "ema_decay": 0.5, "validate_every": 2, "learning_rate": 6e-4}
    )
    train_vae(vae, images, images, tmp_path, resume=False)
    scores = [x["validation"]["psnr"] for x in read_records(tmp_path, "vae") if "validation" in x]
    assert scores[-1] > scores[0] + 0.5


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(tmp_path):
    with (
        RunLock(tmp_path, "pretrain"),
        pytest.raises(RunHeldError, match=re.escape(str(tmp_path))),
    ):
        run_pretrain(CONFIG, tmp_path, stage="corpus", resume=False, say=print)
    assert not (tmp_path / "corpus").exists()
