"""The frozen latent diffusion model, in the two halves that encoding needs at different times.

``LatentEncoder`` holds the VAE and the text encoder: a view's posterior and a prompt's embedding,
each computed once. ``FeatureEncoder`` holds the UNet and the noise schedule: features of a latent
and an embedding at a timestep. The second needs nothing of the first, so another features layer
costs no image, no VAE and no text encoder.

Shape suffixes: B batch, C channels, H/W image or latent height and width, T text tokens,
D text width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from models.blocks import feature_shape, read_features, select_blocks
from models.ldm_files import ModelFilesError

COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers' bar for reading weights off a log: progress is the pipeline's to show."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class LatentEncoder:
    """VAE and text encoder, frozen: images to posteriors, prompts to embeddings."""

    def __init__(
        self,
        *,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        device: torch.device,
    ) -> None:
        self.device = device
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.text_encoder = text_encoder.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        *,
        variant: str | None = None,
        compute: str = "float32",
        device: torch.device | str = "cpu",
    ) -> "LatentEncoder":
        """Load from a diffusers folder; ``compute`` is the dtype of weights and arithmetic."""
        dtype = COMPUTE_DTYPES[compute]
        options = {"variant": variant, "use_safetensors": True, "torch_dtype": dtype}
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", **options)
        options = {"variant": variant, "use_safetensors": True, "dtype": dtype}
        with _without_progress_bar():
            text_encoder = CLIPTextModel.from_pretrained(
                folder, subfolder="text_encoder", **options
            )
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        return cls(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, device=torch.device(device)
        )

    @property
    def scaling_factor(self) -> float:
        """What a latent is multiplied by before the UNet sees it (SD 1.4: 0.18215)."""
        return float(self.vae.config.scaling_factor)

    @property
    def text_shape(self) -> tuple[int, int]:
        """(tokens, width) of an embedding: (77, 768) at SD 1.4."""
        return self.num_tokens, int(self.text_encoder.config.hidden_size)

    @property
    def num_tokens(self) -> int:
        """Tokens that a prompt is padded or cut to: what the text encoder has positions for."""
        positions = int(self.text_encoder.config.max_position_embeddings)
        return min(int(self.tokenizer.model_max_length), positions)

    @torch.inference_mode()
    def encode_image(self, image_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Encode RGB images (B, H, W, 3) uint8 to the posterior's mean and log-variance.

        Both are (B, 4, H/8, W/8) float32 on the device, unscaled; H and W are multiples of 64.
        """
        dtype = self.vae.dtype
        image = image_BHWC.to(self.device).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
        posterior = self.vae.encode(image).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to the last hidden state (B, T, D) float32, padded as SD pads them.

        A prompt over T tokens is cut there, as in Stable Diffusion's own pipeline.
        """
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.num_tokens,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state.float()


class FeatureEncoder:
    """The UNet up to the last block asked for, and the noise schedule, frozen."""

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        alphas_cumprod: Tensor,
        blocks: Sequence[int],
        device: torch.device,
    ) -> None:
        if unet.config.addition_embed_type is not None:
            raise ModelFilesError(
                f"UNet: expected no added conditions (SD 1.x, 2.x), got addition_embed_type "
                f"{unet.config.addition_embed_type!r}; this version does not encode SDXL"
            )
        self.device = device
        self.blocks = select_blocks(unet, blocks)
        self.unet = unet.to(device).eval().requires_grad_(False)
        self.alphas_cumprod = alphas_cumprod.to(device=device, dtype=torch.float64)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        *,
        blocks: Sequence[int],
        variant: str | None = None,
        compute: str = "float32",
        device: torch.device | str = "cpu",
    ) -> "FeatureEncoder":
        """Load from a diffusers folder; ``compute`` is the dtype of weights and arithmetic."""
        unet = UNet2DConditionModel.from_pretrained(
            folder,
            subfolder="unet",
            variant=variant,
            use_safetensors=True,
            torch_dtype=COMPUTE_DTYPES[compute],
        )
        schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        return cls(
            unet=unet,
            alphas_cumprod=schedule.alphas_cumprod,
            blocks=blocks,
            device=torch.device(device),
        )

    def shapes(self, latent_side: tuple[int, int]) -> dict[int, tuple[int, int, int]]:
        """Return block number → (channels, height, width) for latents of this side."""
        return {block.number: feature_shape(block, latent_side) for block in self.blocks}

    @torch.inference_mode()
    def encode(
        self, latent_BCHW: Tensor, noise_BCHW: Tensor, timestep_B: Tensor, text_BTD: Tensor
    ) -> dict[int, Tensor]:
        """Return block number → feature (B, C, h, w) float32 of x_t = sqrt(ᾱ_t)·z + sqrt(1-ᾱ_t)·ε.

        ``latent_BCHW`` is scaled z, ``noise_BCHW`` ε, both float32; ``timestep_B`` int64 in
        [0, 1000); source of the formula: Ho et al., 2020, equation 4.
        """
        timestep = timestep_B.to(self.device)
        alpha = self.alphas_cumprod[timestep][:, None, None, None]
        latent, noise = (x.to(self.device, torch.float64) for x in (latent_BCHW, noise_BCHW))
        noised = (alpha.sqrt() * latent + (1 - alpha).sqrt() * noise).to(self.unet.dtype)
        text = text_BTD.to(self.device, self.unet.dtype)
        features = read_features(self.unet, noised, timestep, text, blocks=self.blocks)
        return {number: feature.float() for number, feature in features.items()}
