"""Encoders of the frozen latent diffusion model: images and prompts, then features of the UNet.

``LatentEncoder`` holds the VAE and the text encoder, ``FeatureEncoder`` the UNet and the noise
schedule: another features layer needs the second alone.

Weights and arithmetic are in ``compute``, but for these: ᾱ and the noising are float64; the
sinusoids of timesteps and time ids, a VAE whose config.json says ``force_upcast``, the softmax
inside torch's scaled_dot_product_attention and the statistics of norms are float32. What is
returned is float32.

Shape suffixes: B batch, C channels, H/W image or latent height and width, T text tokens,
D text width, P pooled text width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from models.ldm.blocks import build_added_conditions, compute_features, feature_shape, select_blocks
from models.ldm.family import check_scaling_factor, check_unet, read_configs, zeroes_empty_prompt
from models.ldm.files import ModelFilesError, load_component, load_weights
from models.ldm.text_encoder import TextEmbedding, TextEncoder
from models.ldm.tuning import PLAIN, Tuning
from models.ldm.unet_config import read_text_width

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_VARIANTS = 64
"""Shapes that one compiled module class may see; torch's 8 is below SD's kinds of blocks."""


class LatentEncoder:
    """Encodes images to the VAE's posteriors, and prompts to embeddings."""

    def __init__(
        self,
        *,
        vae: AutoencoderKL,
        text_encoder: TextEncoder,
        device: torch.device,
        tuning: Tuning = PLAIN,
    ) -> None:
        check_scaling_factor(vae.config.scaling_factor, where="VAE")
        self.device = device
        self.tuning = tuning
        self.vae = vae.to(device).eval().requires_grad_(False)
        tune(self.vae, tuning)
        self.text_encoder = text_encoder.to(device).eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        *,
        variant: str | None = None,
        compute: str = "float32",
        zero_empty_prompt: bool | None = None,
        device: torch.device | str = "cpu",
        tuning: Tuning = PLAIN,
    ) -> "LatentEncoder":
        """Load from a diffusers folder; ``compute`` is the dtype of weights and arithmetic.

        A VAE whose config.json says ``force_upcast: true`` is float32 whatever ``compute`` says:
        SDXL's overflows in float16 (diffusers' StableDiffusionXLPipeline.upcast_vae).
        ``zero_empty_prompt`` None takes what the folder says: see ``zeroes_empty_prompt``.

        Raises:
            ModelFilesError: the model is of a family that is not read, or a file of it is missing,
                damaged or another model's.
        """
        config = read_configs(folder, need=("vae",))["vae"]
        dtype = COMPUTE_DTYPES[compute]
        # From the file: where it says nothing, as SD 1's, the class would take true.
        upcast = config.get("force_upcast", False)
        vae = load_weights(
            AutoencoderKL,
            folder,
            "vae",
            variant=variant,
            torch_dtype=torch.float32 if upcast else dtype,
        )
        if zero_empty_prompt is None:
            zero_empty_prompt = zeroes_empty_prompt(folder)
        text_encoder = TextEncoder.from_pretrained(
            folder, variant=variant, dtype=dtype, zero_empty_prompt=zero_empty_prompt
        )
        return cls(vae=vae, text_encoder=text_encoder, device=torch.device(device), tuning=tuning)

    @property
    def scaling_factor(self) -> float:
        """What a latent is multiplied by before the UNet sees it (SD 1.4: 0.18215)."""
        return float(self.vae.config.scaling_factor)

    @property
    def text_shape(self) -> tuple[int, int]:
        """(tokens, width) of an embedding: (77, 768) at SD 1.4, (77, 2048) at SDXL."""
        return self.text_encoder.num_tokens, self.text_encoder.width

    @property
    def pooled_width(self) -> int | None:
        """Width of a pooled embedding (SDXL: 1280), None where the model has none (SD 1, 2)."""
        return self.text_encoder.pooled_width

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
    def encode_text(self, prompts: Sequence[str]) -> TextEmbedding:
        """Encode prompts to tokens (B, T, D) and, for SDXL, pooled (B, P), both float32."""
        return self.text_encoder(prompts)


class FeatureEncoder:
    """Encodes noised latents to features of some of the UNet's blocks.

    Whether the UNet predicts noise or v does not matter: its output is not read.
    """

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        alphas_cumprod: Tensor,
        blocks: Sequence[int],
        device: torch.device,
        tuning: Tuning = PLAIN,
    ) -> None:
        check_unet(unet.config, where="UNet")
        self.device = device
        self.tuning = tuning
        self.blocks = select_blocks(unet, blocks)
        self.unet = unet.to(device).eval().requires_grad_(False)
        tune(self.unet, tuning)
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
        tuning: Tuning = PLAIN,
    ) -> "FeatureEncoder":
        """Load from a diffusers folder; ``compute`` is the dtype of weights and arithmetic.

        The betas are those of the folder's scheduler, whatever its class: trained ones, and ones
        rescaled to zero terminal SNR, included.

        Raises:
            ModelFilesError: the model is of a family that is not read, or a file of it is missing,
                damaged or another model's.
            ValueError: a block is not one of the UNet's.
        """
        read_configs(folder)  # checks the family
        # First, so that a fault in it shows before gigabytes are read.
        alphas_cumprod = load_component(DDPMScheduler, folder, "scheduler").alphas_cumprod
        if not bool(((alphas_cumprod >= 0) & (alphas_cumprod <= 1)).all()):  # NaN fails too
            raise ModelFilesError(
                f"{folder / 'scheduler'}: the betas must leave a signal between 0 and 1 at every "
                "timestep; fetch scheduler_config.json again"
            )
        unet = load_weights(
            UNet2DConditionModel,
            folder,
            "unet",
            variant=variant,
            torch_dtype=COMPUTE_DTYPES[compute],
        )
        return cls(
            unet=unet,
            alphas_cumprod=alphas_cumprod,
            blocks=blocks,
            device=torch.device(device),
            tuning=tuning,
        )

    def list_shapes(self, latent_side: tuple[int, int]) -> dict[int, tuple[int, int, int]]:
        """Return block number → (channels, height, width) for latents of this side."""
        return {block.number: feature_shape(block, latent_side) for block in self.blocks}

    @torch.inference_mode()
    def encode_features(
        self,
        latent_BCHW: Tensor,
        noise_BCHW: Tensor,
        timestep_B: Tensor,
        text_BTD: Tensor,
        pooled_BP: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Compute the blocks' features of x_t = sqrt(ᾱ_t)·z + sqrt(1-ᾱ_t)·ε.

        Source of the formula: Ho et al. 2020, equation 4.

        Args:
            latent_BCHW: z, scaled, float32.
            noise_BCHW: ε, float32.
            timestep_B: t, int64 in [0, 1000). Those on another device than the CPU are not
                checked, for that would wait for the device.
            text_BTD: the prompts' embeddings.
            pooled_BP: SDXL's pooled embeddings; other UNets do not read them.

        Returns:
            Block number → feature (B, C, h, w) float32.

        Raises:
            ValueError: shapes do not fit, a timestep is out of range, or the UNet reads a pooled
                embedding and it is missing or of another width.
        """
        self._check_inputs(latent_BCHW, noise_BCHW, timestep_B, text_BTD)
        timestep = timestep_B.to(self.device)
        alpha = self.alphas_cumprod[timestep][:, None, None, None]
        latent, noise = (x.to(self.device, torch.float64) for x in (latent_BCHW, noise_BCHW))
        noised = (alpha.sqrt() * latent + (1 - alpha).sqrt() * noise).to(self.unet.dtype)
        text = text_BTD.to(self.device, self.unet.dtype)
        pooled = None if pooled_BP is None else pooled_BP.to(self.device, self.unet.dtype)
        added = build_added_conditions(self.unet.config, pooled, noised)
        features = compute_features(
            self.unet, noised, timestep, text, blocks=self.blocks, added_conditions=added
        )
        return {number: feature.float() for number, feature in features.items()}

    def _check_inputs(
        self, latent_BCHW: Tensor, noise_BCHW: Tensor, timestep_B: Tensor, text_BTD: Tensor
    ) -> None:
        latent, noise, timestep, text = (
            tuple(x.shape) for x in (latent_BCHW, noise_BCHW, timestep_B, text_BTD)
        )
        channels, width = int(self.unet.config.in_channels), read_text_width(self.unet.config)
        fits = len(latent) == 4 and latent[1] == channels and noise == latent
        fits = fits and timestep == latent[:1] and len(text) == 3
        if not fits or text[0] != latent[0] or text[2] != width:
            raise ValueError(
                f"expected latent and noise (B, {channels}, h, w), timestep (B,) and text (B, T, "
                f"{width}) of one batch, got {latent}, {noise}, {timestep} and {text}"
            )
        num = len(self.alphas_cumprod)
        if timestep_B.device.type != "cpu" or timestep_B.numel() == 0:
            return
        low, high = (int(x) for x in timestep_B.aminmax())
        if low < 0 or high >= num:
            raise ValueError(
                f"timesteps must be in [0, {num}), the scheduler's, got {low} to {high}"
            )


def tune(model: nn.Module, tuning: Tuning) -> None:
    """Apply run options to a VAE or a UNet in place."""
    if tuning.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if tuning.compile:
        settings = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, MAX_VARIANTS)
        for module in model.modules():
            if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
                module.compile(dynamic=True)
