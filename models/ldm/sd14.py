"""Stable Diffusion 1.4's published architecture, for sizes and costs without its weights.

Source: ``unet``, ``vae`` and ``text_encoder`` configs of CompVis/stable-diffusion-v1-4 on the
Hugging Face hub; the text encoder is OpenAI's CLIP ViT-L/14.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

SD14_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,  # in truth the number of heads, a misnomer that diffusers keeps
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SD14_SCHEDULE: dict[str, Any] = {  # of every scheduler class; a class adds its own keys
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "trained_betas": None,
}
SD14_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD14_TEXT: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
PAPER_LDZNET_PARAMETERS_M = 925
"""Million parameters of LD-ZNet as its paper gives them (ICCV 2023, section 4)."""


def build_sd14(
    device: torch.device | str,
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Build UNet, VAE and text encoder with random float32 weights, or none on the meta device.

    4.3 GB in all: 860 M, 84 M and 123 M parameters.
    """
    with torch.device(device):
        return (
            UNet2DConditionModel.from_config(SD14_UNET),
            AutoencoderKL.from_config(SD14_VAE),
            CLIPTextModel(CLIPTextConfig(**SD14_TEXT)),
        )
