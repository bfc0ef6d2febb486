"""The tiny model: loads with the real classes, same bytes each time, lets a signal through."""

import hashlib
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from models.tiny.tokenizer import train_merges, write_tokenizer
from models.tiny.write import measure_scaling_factor, write_tiny_ldm

WORDS = ("red", "blue", "circle", "square", "striped", "star", "image", "magenta", "a", "the")
# Blocks 1-16 in forward order, as the LD-ZNet paper numbers them.
BLOCK_MODULES = (
    *(f"down_blocks.{level}.attentions.{n}" for level in (0, 1, 2) for n in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{level}.attentions.{n}" for level in (1, 2, 3) for n in (0, 1, 2)),
)


@pytest.fixture(scope="module")
def images_BHWC():
    """Two images: a red disc left on grey, a blue square right on a gradient."""
    rows, cols = np.mgrid[0:128, 0:128]
    images = np.full((2, 128, 128, 3), 120, dtype=np.uint8)
    images[1] = (rows + cols)[..., None] // 2 + 40
    images[0][(rows - 64) ** 2 + (cols - 40) ** 2 < 28**2] = (210, 30, 30)
    images[1][40:90, 70:120] = (30, 60, 210)
    return torch.from_numpy(images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images_BHWC):
    folder = tmp_path_factory.mktemp("tiny") / "ldm"
    write_tiny_ldm(folder, words=WORDS, calibration_BHWC=images_BHWC)
    return folder


@pytest.fixture(scope="module")
def vae(folder):
    return AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()


@pytest.fixture(scope="module")
def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")


@pytest.fixture(scope="module")
def embed(folder, tokenizer):
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval()

    def embed(*prompts):
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            return encoder(tokens.input_ids).last_hidden_state

    return embed


@pytest.fixture(scope="module")
def latent_BChw(vae, images_BHWC):
    with torch.no_grad():
        return vae.encode(images_BHWC.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean


def _digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_second_run_writes_the_same_bytes_and_another_seed_others(folder, tmp_path, images_BHWC):
    torch.manual_seed(123)  # the global generator must not matter, nor the order of the words
    write_tiny_ldm(tmp_path / "same", words=WORDS[::-1], calibration_BHWC=images_BHWC)
    assert _digests(tmp_path / "same") == _digests(folder)
    write_tiny_ldm(tmp_path / "other", words=WORDS, seed=1)
    changed = {
        name
        for name, digest in _digests(tmp_path / "other").items()
        if digest != _digests(folder)[name]
    }
    assert changed == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_no_file_names_a_path_and_no_weight_is_a_pickle(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".txt", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            text = path.read_text()
            assert "_name_or_path" not in text
            assert str(folder) not in text
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F32"}  # noqa: SIM118


def test_every_weight_file_fits_its_class_exactly(folder):
    for name, model_class in (
        ("vae", AutoencoderKL),
        ("unet", UNet2DConditionModel),
        ("text_encoder", CLIPTextModel),
    ):
        _, info = model_class.from_pretrained(folder, subfolder=name, output_loading_info=True)
        assert not any(info.values()), (name, info)


def test_the_folder_loads_as_a_stable_diffusion_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert pipeline.vae_scale_factor == 8
    assert pipeline.unet.config.sample_size == 16
    assert pipeline.tokenizer("red circle").input_ids[1:-1] == [
        pipeline.tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ("red", "circle")
    ]


def test_the_schedule_is_stable_diffusions(folder):
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(scheduler.betas.double(), betas, rtol=1e-5, atol=0)
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.steps_offset == 1
    assert scheduler.config.clip_sample is False
    assert scheduler.config.trained_betas is None


def test_the_sixteen_transformers_are_at_the_papers_modules(unet):
    found = [
        name for name, part in unet.named_modules() if type(part).__name__ == "Transformer2DModel"
    ]
    assert sorted(found) == sorted(BLOCK_MODULES)
    for name in BLOCK_MODULES:
        assert unet.get_submodule(name).transformer_blocks[0].attn2.heads == 8


def test_each_word_is_one_token_and_other_text_falls_into_pieces(tokenizer):
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert [len(i) for i in ids] == [3] * len(WORDS)  # start, the word, end
    assert len({i[1] for i in ids}) == len(WORDS)
    assert tokenizer("A RED circle.").input_ids[1:4] == [ids[8][1], ids[0][1], ids[2][1]]
    other = tokenizer("zebra 42 日本 é!").input_ids
    assert len(other) > 12
    assert tokenizer.eos_token_id not in other[:-1]  # which is the unknown token too
    assert tokenizer.model_max_length == 77


def test_merges_join_words_that_share_beginnings_and_ends():
    # Chains of merges made word by word would cut "image" by magenta's "ma".
    merges = train_merges(["magenta", "image", "stage", "ma", "im"])
    assert {"magenta</w>", "image</w>", "stage</w>"} <= {"".join(pair) for pair in merges}
    assert len(set(merges)) == len(merges)


def test_the_calibrated_scale_gives_latents_of_unit_spread(folder, vae, latent_BChw):
    scaled = latent_BChw * vae.config.scaling_factor
    assert float(scaled.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert config["scaling_factor"] == round(config["scaling_factor"], 5)


def test_without_calibration_the_scale_is_stable_diffusions(tmp_path):
    write_tiny_ldm(tmp_path, words=WORDS)
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215


def test_latents_tell_places_and_colours_apart(latent_BChw):
    disc, ground = latent_BChw[0, :, 8, 5], latent_BChw[0, :, 1, 14]
    square = latent_BChw[1, :, 8, 11]
    spread = latent_BChw.std()
    assert (disc - ground).norm() > spread
    assert (disc - square).norm() > spread
    assert (latent_BChw.std((2, 3)) > 0.05 * spread).all()


def test_the_posterior_is_narrow(vae, images_BHWC, latent_BChw):
    with torch.no_grad():
        posterior = vae.encode(images_BHWC.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    assert float(posterior.std.max()) < 0.2 * float(latent_BChw.std())


def test_text_embeddings_tell_prompts_apart(embed):
    text_BTD = embed("red circle", "blue square", "red square")
    assert text_BTD.shape == (3, 77, 64)
    assert (text_BTD[0] - text_BTD[1]).pow(2).mean().sqrt() > 0.1
    assert (text_BTD[0] - text_BTD[2]).pow(2).mean().sqrt() > 0.05


def test_features_of_blocks_6_to_10_tell_images_and_prompts_apart(unet, vae, embed, latent_BChw):
    features = {}
    hooks = [
        unet.get_submodule(BLOCK_MODULES[block - 1]).register_forward_hook(
            lambda module, inputs, output, block=block: features.update({block: output[0]})
        )
        for block in range(6, 11)
    ]
    latents = latent_BChw[[0, 1, 0]] * vae.config.scaling_factor
    prompts = embed("red circle", "red circle", "blue square")
    with torch.no_grad():
        unet(latents, 400, prompts)
    for hook in hooks:
        hook.remove()
    assert features[6].shape == features[10].shape == (3, 96, 4, 4)
    assert features[7].shape == (3, 96, 2, 2)
    for block, feature_BCHW in features.items():
        spread = feature_BCHW.std()
        assert 0.1 < spread < 10, block
        assert (feature_BCHW[0] - feature_BCHW[1]).std() > 0.3 * spread, block
        assert (feature_BCHW[0] - feature_BCHW[2]).std() > 0.05 * spread, block


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "at least one word, but got none"),
        (("red circle",), "letters only, but got 'red circle'"),
        (("no1",), "letters only, but got 'no1'"),
        (("",), "letters only, but got ''"),
    ],
)
def test_words_that_cannot_be_tokens_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        write_tokenizer(tmp_path, words=words)


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed must be at least 0, but got -1"):
        write_tiny_ldm(tmp_path, words=WORDS, seed=-1)


@pytest.mark.parametrize(
    "wrong_BHWC",
    [
        torch.zeros(1, 64, 64, 3),
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 60, 64, 3, dtype=torch.uint8),
        torch.zeros(0, 64, 64, 3, dtype=torch.uint8),
    ],
)
def test_calibration_images_of_another_kind_are_refused(vae, wrong_BHWC):
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(B, H, W, 3\)"):
        measure_scaling_factor(vae, wrong_BHWC)
