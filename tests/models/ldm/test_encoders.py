"""The frozen model: blocks as the paper numbers them, values those of a full forward pass."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from models.ldm.blocks import Block, compute_features, feature_shape, list_blocks, select_blocks
from models.ldm.encoders import FeatureEncoder, LatentEncoder
from models.ldm.files import (
    FEATURE_COMPONENTS,
    ModelFilesError,
    digest_model_files,
    list_model_files,
)
from models.ldm.sd14 import SD14_UNET
from models.ldm.unet_config import read_pooled_width

# The published unet/config.json of stable-diffusion-2-1 and stable-diffusion-xl-base-1.0, but for
# what the class takes by itself.
SD21_UNET = {
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def unet(ldm_folder):
    return UNet2DConditionModel.from_pretrained(ldm_folder, subfolder="unet").eval()


@pytest.fixture(scope="module")
def encoder(ldm_folder):
    return FeatureEncoder.from_pretrained(ldm_folder, blocks=[6])


@pytest.fixture(scope="module")
def sd14_unet():
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(SD14_UNET)


def random_inputs(batch=2, side=8, width=64):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 4, side, side, generator=generator),
        torch.tensor([300, 500])[:batch],
        torch.randn(batch, 77, width, generator=generator),
    )


def test_blocks_of_sd14_are_the_papers_table(sd14_unet):
    blocks = list_blocks(sd14_unet)
    shapes = [feature_shape(block, (48, 48)) for block in blocks]
    levels = [(320, 48)] * 2 + [(640, 24)] * 2 + [(1280, 12)] * 2 + [(1280, 6)]
    levels += [(1280, 12)] * 3 + [(640, 24)] * 3 + [(320, 48)] * 3
    assert shapes == [(channels, side, side) for channels, side in levels]
    assert [block.number for block in blocks] == list(range(1, 17))
    assert blocks[6].module == "mid_block.attentions.0"
    assert blocks[7].module == "up_blocks.1.attentions.0"


@pytest.mark.parametrize(
    ("config", "num_parameters", "side", "levels"),
    [
        (
            SD21_UNET,
            865_910_724,
            96,
            [(320, 96, 1)] * 2 + [(640, 48, 1)] * 2 + [(1280, 24, 1)] * 2 + [(1280, 12, 1)]
            + [(1280, 24, 1)] * 3 + [(640, 48, 1)] * 3 + [(320, 96, 1)] * 3,
        ),
        (
            SDXL_UNET,
            2_567_463_684,
            128,
            [(640, 64, 2)] * 2 + [(1280, 32, 10)] * 6 + [(640, 64, 2)] * 3,
        ),
    ],
    ids=["sd21", "sdxl"],
)  # fmt: skip
def test_blocks_at_real_size(config, num_parameters, side, levels):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == num_parameters
    blocks = list_blocks(unet)
    shapes = [(*feature_shape(block, (side, side))[:2], block.num_layers) for block in blocks]
    assert shapes == levels
    assert read_pooled_width(unet.config) == (1280 if config is SDXL_UNET else None)
    if config is SDXL_UNET:
        stages = [".".join(block.module.split(".")[:2]) for block in blocks]
        assert stages == [
            *["down_blocks.1"] * 2, *["down_blocks.2"] * 2, "mid_block.attentions",
            *["up_blocks.0"] * 3, *["up_blocks.1"] * 3,
        ]  # fmt: skip


def test_features_are_those_of_a_full_forward_bit_for_bit(unet):
    latent, timestep, text = random_inputs()
    full = {}
    handles = [
        unet.get_submodule(block.module).register_forward_hook(
            lambda module, args, output, number=block.number: full.update({number: output[0]})
        )
        for block in list_blocks(unet)
    ]
    with torch.inference_mode():
        unet(latent, timestep, encoder_hidden_states=text)
        for handle in handles:
            handle.remove()
        for last in (1, 7, 10, 16):
            blocks = select_blocks(unet, range(1, last + 1))
            found = compute_features(unet, latent, timestep, text, blocks=blocks)
            assert list(found) == list(range(1, last + 1))
            assert all(torch.equal(found[number], full[number]) for number in found)


def test_no_hook_is_left_behind(unet):
    latent, timestep, text = random_inputs()
    with torch.inference_mode():
        compute_features(unet, latent, timestep, text, blocks=select_blocks(unet, [6]))
        assert unet(latent, timestep, encoder_hidden_states=text).sample.shape == latent.shape


def test_stopping_after_block_10_saves_the_flops_that_the_design_says(sd14_unet):
    latent, timestep, text = torch.empty(1, 4, 48, 48), torch.zeros(1), torch.empty(1, 77, 768)
    inputs = [x.to("meta") for x in (latent, timestep, text)]
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        sd14_unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2])
    with torch.no_grad(), FlopCounterMode(display=False) as part:
        compute_features(sd14_unet, *inputs, blocks=select_blocks(sd14_unet, [6, 10]))
    assert part.get_total_flops() / full.get_total_flops() <= 0.56


@pytest.mark.parametrize("numbers", [[], [0], [6, 17]])
def test_unknown_blocks_are_refused(unet, numbers):
    with pytest.raises(ValueError, match="blocks must be some of 1 to 16"):
        select_blocks(unet, numbers)


def test_odd_sides_round_up_as_the_downsamplers_do(unet):
    latent, timestep, text = random_inputs(side=12)
    blocks = select_blocks(unet, [7])
    found = compute_features(unet, latent, timestep, text, blocks=blocks)
    assert found[7].shape[1:] == feature_shape(blocks[0], (12, 12)) == (96, 2, 2)
    assert feature_shape(Block(7, "", 5, 8), (12, 20)) == (5, 2, 3)


def test_features_are_of_the_noised_latent(ldm_folder, unet):
    latent, timestep, text = random_inputs()
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    schedule = DDPMScheduler.from_pretrained(ldm_folder, subfolder="scheduler")
    encoder = FeatureEncoder.from_pretrained(ldm_folder, blocks=[6, 8])
    found = encoder.encode_features(latent, noise, timestep, text)
    noised = schedule.add_noise(latent, noise, timestep)
    with torch.inference_mode():
        blocks = select_blocks(unet, [6, 8])
        expected = compute_features(unet, noised, timestep, text, blocks=blocks)
    for number in (6, 8):
        torch.testing.assert_close(found[number], expected[number], rtol=1e-4, atol=1e-4)


def test_latents_are_the_vaes_posterior(ldm_folder):
    encoder = LatentEncoder.from_pretrained(ldm_folder)
    vae = AutoencoderKL.from_pretrained(ldm_folder, subfolder="vae").eval()
    image = torch.randint(0, 256, (2, 64, 128, 3), dtype=torch.uint8)
    mean, logvar = encoder.encode_image(image)
    with torch.inference_mode():
        posterior = vae.encode(image.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    assert mean.shape == logvar.shape == (2, 4, 8, 16)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(logvar, posterior.logvar)


def test_text_is_padded_and_cut_to_the_encoders_positions(ldm_folder):
    encoder = LatentEncoder.from_pretrained(ldm_folder)
    text, pooled = encoder.encode_text(["red circle", "red circle " * 100, ""])
    assert text.shape == (3, *encoder.text_shape) == (3, 77, 64)
    assert pooled is encoder.pooled_width is None
    assert torch.equal(text, encoder.encode_text(["red circle", "red circle " * 100, ""]).tokens)
    assert not torch.allclose(text[0], text[2])


def test_a_unet_with_other_added_conditions_is_refused(unet):
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    extra = {"addition_embed_type": "text", "encoder_hid_dim": 64}
    other = UNet2DConditionModel(**{**config, **extra, "addition_embed_type_num_heads": 8})
    with pytest.raises(ModelFilesError, match=r"UNet: encoder_hid_dim_type .* which is not read"):
        FeatureEncoder(
            unet=other, alphas_cumprod=torch.ones(10), blocks=[6], device=torch.device("cpu")
        )


def test_pickled_weights_are_refused(tmp_path):
    for part in FEATURE_COMPONENTS:
        (tmp_path / part).mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelFilesError, match=r"weights are pickles .*a pickle runs code"):
        list_model_files(tmp_path, FEATURE_COMPONENTS)


def test_missing_part_and_missing_weights_are_named(tmp_path):
    with pytest.raises(ModelFilesError, match="expected a folder 'unet'"):
        list_model_files(tmp_path, FEATURE_COMPONENTS)
    (tmp_path / "unet").mkdir()
    with pytest.raises(ModelFilesError, match="variant 'fp16', got none"):
        list_model_files(tmp_path, FEATURE_COMPONENTS, variant="fp16")


def test_digests_cover_weights_and_configs(ldm_folder):
    digests = digest_model_files(ldm_folder, FEATURE_COMPONENTS)
    assert sorted(digests) == [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("number", "value", "message"),
    [
        (1, torch.zeros(3, 4, 8, 8), r"of one batch, got \(2, 4, 8, 8\), \(3, 4, 8, 8\), \(2,\)"),
        (1, torch.zeros(2, 4, 8, 1), "of one batch"),
        (2, torch.tensor([300]), r"timestep \(B,\) .* \(1,\)"),
        (2, torch.tensor(300), r"timestep \(B,\) .* \(\)"),
        (3, torch.zeros(1, 77, 64), r"\(1, 77, 64\)"),
        (3, torch.zeros(2, 77, 32), r"text \(B, T, 64\) .* \(2, 77, 32\)"),
        (2, torch.tensor([0, -1]), r"timesteps must be in \[0, 1000\), .* got -1 to 0"),
        (2, torch.tensor([1000, 999]), "got 999 to 1000"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(encoder, number, value, message):
    latent, timestep, text = random_inputs()
    inputs = [latent, latent, timestep, text]
    inputs[number] = value
    with pytest.raises(ValueError, match=message):
        encoder.encode_features(*inputs)


def test_the_ends_of_the_schedule_are_encoded(encoder):
    latent, _, text = random_inputs()
    assert encoder.encode_features(latent, latent, torch.tensor([0, 999]), text)[6].isfinite().all()


def test_a_width_listed_by_stage_gives_the_same_features(ldm_folder, tmp_path, encoder):
    folder = shutil.copytree(ldm_folder, tmp_path / "ldm")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": [64] * 4}))
    latent, timestep, text = random_inputs()
    listed = FeatureEncoder.from_pretrained(folder, blocks=[6])
    found, expected = (
        x.encode_features(latent, latent, timestep, text)[6] for x in (listed, encoder)
    )
    assert torch.equal(found, expected)


def test_the_prompts_that_are_cut_are_found_whatever_runs_beside(ldm_folder):
    """Of T tokens two are start and end; a word of one letter that the vocabulary lacks is one."""
    text = LatentEncoder.from_pretrained(ldm_folder).text_encoder
    num = text.num_tokens - 2
    fits, over = " ".join("x" * num), " ".join("x" * (num + 1))
    assert len(text.tokenizers[0](fits)["input_ids"]) == text.num_tokens
    accents = "é" * (num // 2 + 1)  # two bytes each
    marks = ("!?" * num)[: num + 1]  # as many tokens as bytes: the fewest that can be cut
    assert len(text.tokenizers[0](marks)["input_ids"]) == text.num_tokens + 1
    prompts = ["", "short", fits, over, accents, marks, marks[:-1]]
    assert text.find_cut(prompts) == {over, accents, marks}
    assert text.find_cut([]) == set()
    expected = text(prompts).tokens
    with ThreadPoolExecutor(4) as pool:  # a tokenizer keeps the settings of its last call
        found = pool.map(lambda _: text.find_cut(prompts), range(200))
        embeddings = [text(prompts).tokens for _ in range(5)]
        assert all(cut == {over, accents, marks} for cut in found)
    assert all(torch.equal(tokens, expected) for tokens in embeddings)


def test_a_prompt_is_cut_if_one_of_two_tokenizers_cuts_it(ldm_folder):
    text = LatentEncoder.from_pretrained(ldm_folder).text_encoder
    words = " ".join(["circle"] * (text.num_tokens - 2))
    assert text.find_cut([words]) == set()
    first = text.tokenizers[0]
    text.tokenizers = (first, lambda prompts, **_: first([x + " x" for x in prompts]))
    assert text.find_cut([words]) == {words}
