"""Families are told by the published configs: SD 1, 2 and SDXL base pass, others are refused."""

import json
import shutil

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from models.ldm.encoders import FeatureEncoder, LatentEncoder
from models.ldm.family import read_configs, read_text_pooled_width
from models.ldm.files import ModelFilesError

# What is told by, of the published configs.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TEXT = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "class_embed_type": None}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 4,
}
SD1 = {
    "scheduler": BETAS | {"_class_name": "PNDMScheduler", "trained_betas": None},
    "text_encoder": TEXT | {"hidden_size": 768, "projection_dim": 768},
    "unet": UNET | {"cross_attention_dim": 768},
    "vae": VAE,
}
SD2 = {
    "scheduler": BETAS | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "text_encoder": TEXT | {"hidden_size": 1024, "projection_dim": 512},
    "unet": UNET | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]},
    "vae": VAE,
}
SDXL = {
    "scheduler": BETAS | {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000},
    "text_encoder": TEXT | {"hidden_size": 768, "projection_dim": 768},
    "text_encoder_2": {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_size": 1280,
        "projection_dim": 1280,
    },
    "unet": UNET
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "vae": VAE | {"force_upcast": True},
}


def write_configs(folder, configs):
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config))
    return folder


def load_features(folder):
    return FeatureEncoder.from_pretrained(folder, blocks=[1])


@pytest.mark.parametrize(
    ("configs", "width"), [(SD1, None), (SD2, None), (SDXL, 1280)], ids=["sd1", "sd2", "sdxl"]
)
def test_the_families_that_are_read_pass(tmp_path, configs, width):
    folder = write_configs(tmp_path, configs)
    assert read_text_pooled_width(read_configs(folder)) == width
    shutil.rmtree(folder / "text_encoder")  # found missing by whoever loads it
    if width is None:
        read_configs(folder)


def edit(part, **changes):
    """A change to a part's config."""

    def apply(folder):
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def remove(*parts):
    return lambda folder: [shutil.rmtree(folder / part) for part in parts]


def flow_match(folder):
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


def break_config(folder):
    (folder / "unet" / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("text_encoder"), "no text_encoder, as SDXL's refiner"),
        (edit("unet", projection_class_embeddings_input_dim=2560), "6 time ids .* refiner"),
        (edit("unet", addition_embed_type="text"), "addition_embed_type must be null .* 'text'"),
        (edit("unet", addition_embed_type=None), "must be 'text_time' beside 2 text encoder"),
        (remove("text_encoder_2"), "must be None beside 1 text encoder.* got 'text_time'"),
        (edit("unet", class_embed_type="projection"), r"class condition \(unCLIP\)"),
        (edit("unet", num_class_embeds=1000), "x4 upscaler"),
        (edit("unet", time_cond_proj_dim=256), "guidance condition"),
        (edit("unet", encoder_hid_dim_type="text_proj"), "projected text or image"),
        (edit("unet", num_attention_heads=[1, 2, 4]), "under attention_head_dim alone"),
        (edit("unet", in_channels=9), "expected in_channels 4, .* got 9: inpainting"),
        (edit("unet", cross_attention_dim=64), "cross_attention_dim must be 2048, .* got 64"),
        (edit("unet", _class_name="UNet3DConditionModel"), "class UNet2DConditionModel, got"),
        (
            edit("unet", down_block_types=["SimpleCrossAttnDownBlock2D"],
                 mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=["UpBlock2D"]),
            "expected spatial transformers .* got SimpleCrossAttnDownBlock2D",
        ),
        (edit("vae", block_out_channels=[8, 8, 8]), "factor 8 .* got factor 4"),
        (edit("vae", _class_name="AutoencoderDC"), "class AutoencoderKL, got"),
        (edit("vae", shift_factor=0.1), "shift_factor is set"),
        (edit("text_encoder", architectures=["T5EncoderModel"], model_type="t5"), "got T5Enc"),
        (edit("text_encoder_2", architectures=["CLIPTextModel"]), "class CLIPTextModelWithPro"),
        (flow_match, "noise schedule given by betas, got FlowMatchEulerDiscreteScheduler"),
        (edit("scheduler", beta_start=None), "given by betas, got Euler.* without beta_start"),
        (edit("scheduler", beta_schedule=None), "given by betas, got Euler.* without beta_sch"),
        (edit("unet", cross_attention_dim=[2048, 2048, 768]), r"number above 0, .* got \[2048, 2"),
        (edit("unet", cross_attention_dim=[64] * 3), "cross_attention_dim must be 2048, .* got 64"),
        (edit("unet", cross_attention_dim="2048"), "cross_attention_dim must be one whole number"),
        (edit("vae", scaling_factor=0), "scaling_factor must be a finite number above 0, got 0"),
        (edit("scheduler", num_train_timesteps=50), "expected 1000 timesteps, got 50"),
        (edit("scheduler", trained_betas=[0.01] * 10), "expected 1000 timesteps, got 10"),
        (edit("scheduler", use_flow_sigmas=True), "noise schedule given by betas"),
        (lambda folder: (folder / "transformer").mkdir(), "got a diffusion transformer"),
        (break_config, "cannot be read as the UNet's config: .*expected an object, got list"),
    ],
)  # fmt: skip
def test_other_families_are_refused_by_config_alone(tmp_path, change, message):
    """There is no weight in the folder: nothing gets as far as to miss one."""
    folder = write_configs(tmp_path, SDXL)
    change(folder)
    for load in (LatentEncoder.from_pretrained, load_features, read_configs):
        with pytest.raises(ModelFilesError, match=message):
            load(folder)


def test_a_text_width_said_for_each_stage_is_one_width(tmp_path):
    folder = write_configs(tmp_path, SDXL)
    edit("unet", cross_attention_dim=[2048] * 3)(folder)
    read_configs(folder)


def test_a_silent_scheduler_is_not_taken_for_diffusers_default(tmp_path):
    folder = write_configs(tmp_path, SD1 | {"scheduler": {}})
    with pytest.raises(ModelFilesError, match="without beta_start, beta_end, beta_schedule"):
        read_configs(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"trained_betas": [0.01] * 1000})
    )
    read_configs(folder)
