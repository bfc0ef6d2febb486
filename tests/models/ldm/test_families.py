"""SD 2 and SDXL, narrow: diffusers' own pipelines and a plain forward pass are the oracle."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from models.ldm.blocks import (
    build_added_conditions,
    compute_features,
    feature_shape,
    list_blocks,
    select_blocks,
)
from models.ldm.encoders import FeatureEncoder, LatentEncoder
from models.ldm.family import read_configs, read_text_pooled_width, zeroes_empty_prompt
from models.ldm.files import ModelFilesError, digest_model_files, list_latent_components
from models.ldm.unet_config import read_pooled_width

# What SD 2.1's and SDXL base's unet/config.json say, but for widths, groups and depths; heads and
# depths stay distinct from level to level.
NARROW_SD2 = {
    "attention_head_dim": [1, 2, 4, 4],
    "block_out_channels": [8, 16, 32, 32],
    "cross_attention_dim": 48,
    "norm_num_groups": 8,
    "sample_size": 8,
    "upcast_attention": True,
    "use_linear_projection": True,
}
NARROW_SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": [1, 2, 4],
    "block_out_channels": [8, 16, 32],
    "cross_attention_dim": 32 + 48,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "norm_num_groups": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "sample_size": 8,
    "transformer_layers_per_block": [1, 2, 3],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
PROMPTS = ["a photo of a red circle.", "", "red circle " * 100]


def save_text_encoder(source, folder, kind, **options):
    """Save a narrow CLIP text model, random, with the vocabulary of the tiny model."""
    vocabulary = json.loads((source / "text_encoder" / "config.json").read_text())
    config = {"vocab_size": vocabulary["vocab_size"], "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 77, "initializer_factor": 3.0}
    # 2, as published: then the end of text is the token of the highest id.
    config |= {"bos_token_id": vocabulary["bos_token_id"], "eos_token_id": 2}
    kind(CLIPTextConfig(**config | options)).save_pretrained(folder)


def save_vae(source, folder, **options):
    vae = AutoencoderKL.from_pretrained(source, subfolder="vae")
    vae.register_to_config(**options)
    vae.save_pretrained(folder)


def save_tokenizer(source, folder, pad_token):
    tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", pad_token=pad_token)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def sd2_folder(tmp_path_factory, ldm_folder):
    """SD 2's classes and options, narrow: OpenCLIP text, heads by level, v prediction."""
    folder = tmp_path_factory.mktemp("sd2")
    torch.manual_seed(0)
    UNet2DConditionModel(**NARROW_SD2).save_pretrained(folder / "unet")
    text = {"hidden_size": 48, "intermediate_size": 96, "hidden_act": "gelu"}
    save_text_encoder(ldm_folder, folder / "text_encoder", CLIPTextModel, **text)
    save_tokenizer(ldm_folder, folder / "tokenizer", pad_token="!")
    save_vae(ldm_folder, folder / "vae", force_upcast=False)
    save_scheduler(folder, DDIMScheduler, prediction_type="v_prediction")
    return folder


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory, ldm_folder):
    """SDXL base's classes and options, narrow."""
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(1)
    UNet2DConditionModel(**NARROW_SDXL).save_pretrained(folder / "unet")
    first = {"hidden_size": 32, "intermediate_size": 64}
    second = {"hidden_size": 48, "intermediate_size": 96, "hidden_act": "gelu"}
    second |= {"projection_dim": 24}
    save_text_encoder(ldm_folder, folder / "text_encoder", CLIPTextModel, **first)
    kind = CLIPTextModelWithProjection
    save_text_encoder(ldm_folder, folder / "text_encoder_2", kind, **second)
    save_tokenizer(ldm_folder, folder / "tokenizer", pad_token="<|endoftext|>")
    save_tokenizer(ldm_folder, folder / "tokenizer_2", pad_token="!")
    save_vae(ldm_folder, folder / "vae", force_upcast=True, scaling_factor=0.13025)
    save_scheduler(folder, EulerDiscreteScheduler)
    write_index(folder, force_zeros_for_empty_prompt=True)
    return folder


def save_scheduler(folder, kind, **options):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kind(**betas | options).save_pretrained(folder / "scheduler")


def write_index(folder, **options):
    (folder / "model_index.json").write_text(json.dumps(options))


@pytest.fixture
def family(request, sd2_folder, sdxl_folder):
    return {"sd2": sd2_folder, "sdxl": sdxl_folder}[request.param]


def load_pipeline(folder):
    """Diffusers' own pipeline, of parts that its classes load themselves."""
    parts = {
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval(),
        "scheduler": DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
        "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
    }
    if not (folder / "text_encoder_2").exists():
        options = {"safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**parts, **options, requires_safety_checker=False)
    kind = CLIPTextModelWithProjection
    parts["text_encoder_2"] = kind.from_pretrained(folder, subfolder="text_encoder_2").eval()
    parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2")
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def random_inputs(folder, side=(8, 16), batch=2):
    generator = torch.Generator().manual_seed(0)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    width = read_pooled_width(unet)
    text = torch.randn(batch, 77, unet["cross_attention_dim"], generator=generator)
    return {
        "latent": torch.randn(batch, 4, *side, generator=generator),
        "noise": torch.randn(batch, 4, *side, generator=generator),
        "timestep": torch.tensor([300, 500])[:batch],
        "text": text,
        "pooled": torch.randn(batch, width, generator=generator) if width else None,
    }


def test_sd2_text_is_what_the_pipeline_encodes(sd2_folder):
    encoder = LatentEncoder.from_pretrained(sd2_folder)
    with torch.inference_mode():
        expected, _ = load_pipeline(sd2_folder).encode_prompt(PROMPTS, "cpu", 1, False)
    text, pooled = encoder.encode_text(PROMPTS)
    assert text.shape == (3, *encoder.text_shape) == (3, 77, 48)
    assert pooled is encoder.pooled_width is None
    assert torch.equal(text, expected)
    assert text[1].abs().max() > 0.1, "SD 2's empty prompt is CLIP's"


def test_sdxl_text_and_pooled_are_what_the_pipeline_encodes(sdxl_folder):
    encoder = LatentEncoder.from_pretrained(sdxl_folder, zero_empty_prompt=False)
    with torch.inference_mode():
        expected, _, pooled, _ = load_pipeline(sdxl_folder).encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False
        )
    found = encoder.encode_text(PROMPTS)
    assert found.tokens.shape == (3, *encoder.text_shape) == (3, 77, 80)
    assert found.pooled.shape == (3, encoder.pooled_width) == (3, 24)
    assert torch.equal(found.tokens, expected)
    assert torch.equal(found.pooled, pooled)
    assert not torch.equal(pooled[0], pooled[1])


def test_sdxls_first_text_encoder_runs_no_layer_that_nothing_reads(sdxl_folder):
    """Values are held to diffusers' pipeline, all layers run, in the test above."""
    first, second = LatentEncoder.from_pretrained(sdxl_folder).text_encoder.encoders
    assert (len(first.encoder.layers), len(second.text_model.encoder.layers)) == (2, 3)
    assert not list(first.final_layer_norm.parameters())


def test_sdxls_empty_prompt_is_zeros_where_the_folder_says_so(sdxl_folder, tmp_path):
    pipeline = load_pipeline(sdxl_folder)
    with torch.inference_mode():
        text, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS[0], device="cpu")
    found = LatentEncoder.from_pretrained(sdxl_folder).encode_text([PROMPTS[0], ""])
    torch.testing.assert_close(found.tokens, torch.cat([text, empty]))
    torch.testing.assert_close(found.pooled, torch.cat([pooled, empty_pooled]))
    assert not found.tokens[1].any()
    assert not found.pooled[1].any()
    assert read_text_pooled_width(read_configs(sdxl_folder)) == 24
    (tmp_path / "text_encoder_2").mkdir()
    assert zeroes_empty_prompt(tmp_path), "diffusers' default"
    write_index(tmp_path, force_zeros_for_empty_prompt=False)
    assert not zeroes_empty_prompt(tmp_path)
    (tmp_path / "model_index.json").write_text("[")
    with pytest.raises(ModelFilesError, match="cannot be read as a model's index"):
        zeroes_empty_prompt(tmp_path)


def test_time_ids_are_the_pipelines_for_an_image_of_the_views_size(sdxl_folder):
    pipeline = load_pipeline(sdxl_folder)
    size = (64, 128)
    expected = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, 24)
    pooled = torch.randn(2, 24)
    found = build_added_conditions(pipeline.unet.config, pooled, torch.empty(2, 4, 8, 16))
    assert sorted(found) == ["text_embeds", "time_ids"]
    assert found["text_embeds"] is pooled
    assert torch.equal(found["time_ids"], expected.expand(2, -1))


def test_pooled_text_is_held_to_the_unet(sdxl_folder):
    latent = torch.empty(2, 4, 8, 8)
    assert build_added_conditions(NARROW_SD2, None, latent) is None
    with pytest.raises(ValueError, match=r"text_pooled must be \(2, 24\).* got none"):
        build_added_conditions(NARROW_SDXL, None, latent)
    with pytest.raises(ValueError, match=r"text_pooled must be \(2, 24\).* got \(2, 32\)"):
        build_added_conditions(NARROW_SDXL, torch.empty(2, 32), latent)
    with pytest.raises(ValueError, match=r"must be null .* got 'image'"):
        build_added_conditions({"addition_embed_type": "image"}, None, latent)
    with pytest.raises(ValueError, match="must be whole numbers, got None and None"):
        read_pooled_width({"addition_embed_type": "text_time"})
    inputs = random_inputs(sdxl_folder) | {"pooled": None}
    with pytest.raises(ValueError, match="text_pooled must be"):
        FeatureEncoder.from_pretrained(sdxl_folder, blocks=[1]).encode_features(*inputs.values())


@pytest.mark.parametrize(("family", "num"), [("sd2", 16), ("sdxl", 11)], indirect=["family"])
def test_features_are_those_of_a_full_forward_bit_for_bit(family, num):
    unet = UNet2DConditionModel.from_pretrained(family, subfolder="unet").eval()
    inputs = random_inputs(family)
    latent, timestep, text = (inputs[name] for name in ("latent", "timestep", "text"))
    added = None
    if inputs["pooled"] is not None:
        time_ids = torch.tensor([[64.0, 128.0, 0.0, 0.0, 64.0, 128.0]] * 2)
        added = {"text_embeds": inputs["pooled"], "time_ids": time_ids}
    blocks = list_blocks(unet)
    assert [block.number for block in blocks] == list(range(1, num + 1))
    full = {}
    handles = [
        unet.get_submodule(block.module).register_forward_hook(
            lambda module, args, output, number=block.number: full.update({number: output[0]})
        )
        for block in blocks
    ]
    with torch.inference_mode():
        unet(latent, timestep, encoder_hidden_states=text, added_cond_kwargs=added)
        for handle in handles:
            handle.remove()
        assert list(full) == sorted(full), "numbers are in forward order"
        for last in range(1, num + 1):
            found = compute_features(
                unet, latent, timestep, text, blocks=blocks[:last], added_conditions=added
            )
            assert list(found) == list(range(1, last + 1))
            for block in blocks[:last]:
                assert torch.equal(found[block.number], full[block.number])
                assert found[block.number].shape[1:] == feature_shape(block, (8, 16))


@pytest.mark.parametrize("family", ["sd2", "sdxl"], indirect=True)
def test_encoding_noises_conditions_and_stops(family):
    """The encoder's own path, from scaled latent to features, against the plain UNet's."""
    inputs = random_inputs(family)
    encoder = FeatureEncoder.from_pretrained(family, blocks=[5, 9])
    found = encoder.encode_features(*inputs.values())
    schedule = DDIMScheduler.from_pretrained(family, subfolder="scheduler")
    noised = schedule.add_noise(inputs["latent"], inputs["noise"], inputs["timestep"])
    unet = UNet2DConditionModel.from_pretrained(family, subfolder="unet").eval()
    added = build_added_conditions(unet.config, inputs["pooled"], noised)
    with torch.inference_mode():
        expected = compute_features(
            unet,
            noised,
            inputs["timestep"],
            inputs["text"],
            blocks=select_blocks(unet, [5, 9]),
            added_conditions=added,
        )
    assert sorted(found) == [5, 9]
    for number, feature in found.items():
        assert tuple(feature.shape[1:]) == encoder.list_shapes((8, 16))[number]
        torch.testing.assert_close(feature, expected[number], rtol=1e-4, atol=1e-4)


def test_sdxl_features_depend_on_pooled_text(sdxl_folder):
    inputs = random_inputs(sdxl_folder)
    encoder = FeatureEncoder.from_pretrained(sdxl_folder, blocks=[5])
    first = encoder.encode_features(*inputs.values())[5]
    other = encoder.encode_features(*(inputs | {"pooled": inputs["pooled"] + 1}).values())[5]
    assert not torch.allclose(first, other, atol=1e-3)


def test_attention_is_torchs(sdxl_folder, ldm_folder):
    for folder in (sdxl_folder, ldm_folder):
        unet = FeatureEncoder.from_pretrained(folder, blocks=[1]).unet
        latents = LatentEncoder.from_pretrained(folder)
        processors = [*unet.attn_processors.values(), *latents.vae.attn_processors.values()]
        assert {type(processor) for processor in processors} == {AttnProcessor2_0}
        attention = {x.config._attn_implementation for x in latents.text_encoder.encoders}
        assert attention == {"sdpa"}


def test_a_vae_that_must_be_float32_is(sdxl_folder, sd2_folder, ldm_folder):
    half = LatentEncoder.from_pretrained(sdxl_folder, compute="float16")
    assert half.vae.dtype == torch.float32
    assert {p.dtype for p in half.text_encoder.parameters()} == {torch.float16}
    image = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    whole = LatentEncoder.from_pretrained(sdxl_folder)
    for ours, theirs in zip(half.encode_image(image), whole.encode_image(image), strict=True):
        assert torch.equal(ours, theirs)
    for folder in (sd2_folder, ldm_folder):  # one says false, the other nothing
        assert LatentEncoder.from_pretrained(folder, compute="float16").vae.dtype == torch.float16


@pytest.mark.parametrize("family", ["sd2", "sdxl"], indirect=True)
def test_half_precision_stays_near(family):
    inputs = random_inputs(family)
    whole = FeatureEncoder.from_pretrained(family, blocks=[5]).encode_features(*inputs.values())[5]
    encoder = FeatureEncoder.from_pretrained(family, blocks=[5], compute="bfloat16")
    half = encoder.encode_features(*inputs.values())[5]
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().max() <= 1e-1 * whole.abs().max()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DDIMScheduler, {"rescale_betas_zero_snr": True}),
        (DDPMScheduler, {"trained_betas": torch.linspace(1e-4, 3e-2, 1000).tolist()}),
        (DDPMScheduler, {"beta_schedule": "squaredcos_cap_v2"}),
        (EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
        (PNDMScheduler, {"beta_schedule": "linear"}),
    ],
)
def test_the_noise_schedule_is_the_folders_whatever_its_class(sd2_folder, tmp_path, kind, options):
    folder = shutil.copytree(sd2_folder, tmp_path / "model")
    save_scheduler(folder, kind, **options)
    expected = kind.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    found = FeatureEncoder.from_pretrained(folder, blocks=[1]).alphas_cumprod
    assert torch.equal(found, expected.double())
    assert (found[-1] == 0) == ("rescale_betas_zero_snr" in options)


def test_what_the_unet_predicts_changes_no_feature(sd2_folder, tmp_path):
    folder = shutil.copytree(sd2_folder, tmp_path / "model")
    save_scheduler(folder, DDIMScheduler, prediction_type="epsilon")
    inputs = random_inputs(folder)
    first, second = (
        FeatureEncoder.from_pretrained(x, blocks=[3]).encode_features(*inputs.values())[3]
        for x in (sd2_folder, folder)
    )
    assert torch.equal(first, second)


def test_digests_cover_the_second_text_encoder(sdxl_folder, sd2_folder):
    digests = digest_model_files(sdxl_folder, list_latent_components(sdxl_folder))
    assert {"text_encoder_2/model.safetensors", "text_encoder_2/config.json"} <= set(digests)
    assert any(name.startswith("tokenizer_2/") for name in digests)
    assert list_latent_components(sd2_folder) == ("vae", "text_encoder", "tokenizer")


def test_a_unet_without_a_middle_is_numbered_on():
    config = NARROW_SD2 | {"mid_block_type": None}
    blocks = list_blocks(UNet2DConditionModel(**config))
    assert [block.number for block in blocks] == list(range(1, 16))
    assert blocks[6].module == "up_blocks.1.attentions.0"


def test_two_text_encoders_take_prompts_of_one_length(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 32}))
    with pytest.raises(ModelFilesError, match=r"prompts of one length, got \[77, 32\] tokens"):
        LatentEncoder.from_pretrained(folder)
