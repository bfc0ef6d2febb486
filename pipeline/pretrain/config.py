"""Settings of a pretraining run: the scenes, the training of each part, the model card."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.base.yaml import FrozenModel
from pipeline.scenes.looks import LOOKS
from pipeline.spec.fields import NUM_TIMESTEPS


class CorpusConfig(FrozenModel):
    """The scenes that are drawn."""

    num_train: int = Field(default=12_000, ge=1)  # scenes, of all looks together
    num_validation: int = Field(default=384, ge=1)  # scenes, never trained on
    images_per_tar: int = Field(default=400, ge=1)
    size: int = Field(default=128, ge=64)  # px, side of a scene
    looks: tuple[str, ...] = ("standard", "flat", "ink", "night", "film", "pastel")
    standard_share: float = Field(default=0.4, ge=0, le=1)  # of scenes in the first look
    few_share: float = Field(default=0.8, ge=0, le=1)  # of scenes with one or two objects
    num_phrases: int = Field(default=1, ge=0)  # single phrases a scene, beside its caption
    seed: int = Field(default=1000, ge=0)  # of the scenes; the demo draws its own with 0

    @field_validator("looks")
    @classmethod
    def _looks(cls, looks: tuple[str, ...]) -> tuple[str, ...]:
        if not looks or set(looks) - set(LOOKS):
            raise ValueError(f"looks must be some of {', '.join(LOOKS)}, got {list(looks)}")
        return looks


class LoopConfig(FrozenModel):
    """What the training of both stages has in common."""

    learning_rate: float = Field(gt=0)  # AdamW's, between warm-up and decay
    warmup_steps: int = Field(default=100, ge=0)  # linear from 0
    decay_share: float = Field(default=0.3, ge=0, le=1)  # of the steps, the last: linear to 0
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW's; 0.99 forgets sooner in a short run
    clip_norm: float = Field(default=1.0, gt=0)  # of the gradients of all parameters
    ema_decay: float = Field(default=0.999, ge=0, lt=1)  # of the weights that are shipped
    precision: Literal["float32", "bfloat16"] = "float32"  # of the arithmetic; weights: float32
    log_every: int = Field(default=20, ge=1)  # steps
    validate_every: int = Field(default=500, ge=1)  # steps
    checkpoint_every: int = Field(default=200, ge=1)  # steps
    seed: int = Field(default=0, ge=0)  # of new weights, order, crops, noise, timesteps


class VaeConfig(LoopConfig):
    """The VAE's training."""

    num_steps: int = Field(ge=1)  # optimizer steps; a resumed run may have another number
    batch_size: int = Field(default=16, ge=1)  # crops a step
    crop: int = Field(default=64, ge=32, multiple_of=8)  # px, side of the random crops
    whole_share: float = Field(default=0.25, ge=0, le=1)  # whole scenes, shrunk to the crop's size
    square_weight: float = Field(default=5.0, ge=0)  # of the mean squares, beside L1's 1
    pooled_weight: float = Field(default=20.0, ge=0)  # of the mean squares of 8 px averages
    gradient_weight: float = Field(default=0.3, ge=0)  # of the L1 of differences of neighbours
    kl_weight: float = Field(default=1e-4, ge=0)  # of the KL divergence a latent value, in nats


class LdmPhase(FrozenModel):
    """Some steps at one size of scene: small scenes first are cheaper and teach the words.

    ``LdmConfig.check_begun`` says what may change when a run is resumed.
    """

    size: int = Field(ge=64)  # px, side of the encoded views
    num_steps: int = Field(ge=1)  # optimizer steps
    batch_size: int = Field(ge=1)  # pairs a step
    num_tars: int | None = Field(default=None, ge=1)  # of training scenes, the first; null: all
    snr_floor: float | None = Field(default=None, gt=0)  # weighs large timesteps up; null: not


class LdmConfig(LoopConfig):
    """The training of the UNet and the text encoder together."""

    phases: tuple[LdmPhase, ...] = Field(min_length=1)  # one after the other
    drop_prompt: float = Field(default=0.1, ge=0, le=1)  # share of prompts replaced by ""
    min_snr: float | None = Field(default=5.0, gt=0)  # gamma of Min-SNR weighting; null: uniform
    timesteps: int = Field(default=NUM_TIMESTEPS, ge=1, le=NUM_TIMESTEPS)  # drawn from [0, so many)
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # one a pair, drawn where there are several

    @field_validator("phases")
    @classmethod
    def _phases(cls, phases: tuple[LdmPhase, ...]) -> tuple[LdmPhase, ...]:
        tars = {phase.size: phase.num_tars for phase in phases}
        for phase in phases:
            if phase.num_tars != tars[phase.size]:
                raise ValueError(
                    f"phases of {phase.size} px read the same latents and must have the same "
                    f"num_tars, got {phase.num_tars} and {tars[phase.size]}"
                )
        return phases

    def check_begun(self, earlier: "LdmConfig", step: int) -> None:
        """Check that a run of ``earlier``, at ``step``, can go on with this config.

        Phases that had begun must stay as they were; only the last of them may have another number
        of steps, at least those taken. Later phases are free.

        Raises:
            ValueError: a phase differs.
        """
        first = 0
        for number, theirs in enumerate(earlier.phases):
            taken = step - first
            if taken <= 0:
                return
            ours = self.phases[number] if number < len(self.phases) else None
            ended = taken > theirs.num_steps
            if (
                ours is None
                or ours.model_copy(update={"num_steps": theirs.num_steps}) != theirs
                or (ours.num_steps != theirs.num_steps if ended else ours.num_steps < taken)
            ):
                steps = "" if ended else f", or with another num_steps of at least {taken}"
                raise ValueError(
                    f"phases[{number}] had begun by step {step}: expected {theirs!r}{steps}, got "
                    f"{ours!r}"
                )
            first += theirs.num_steps

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.num_steps for phase in self.phases)


class CardConfig(FrozenModel):
    """What the model card shows."""

    num_scenes: int = Field(default=48, ge=1)  # new ones of each look, for the PSNR
    num_samples: int = Field(default=4, ge=1)  # images a prompt of the sheet
    num_steps: int = Field(default=30, ge=1, le=NUM_TIMESTEPS)  # of DDIM
    guidance: float = Field(default=5.0, ge=1)  # classifier-free; 1: none
    seed: int = Field(default=0, ge=0)  # of the samples


class PretrainConfig(FrozenModel):
    """A pretraining recipe."""

    corpus: CorpusConfig = CorpusConfig()
    vae: VaeConfig
    ldm: LdmConfig
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _fits(self) -> "PretrainConfig":
        if self.vae.crop > self.corpus.size:
            raise ValueError(
                f"vae.crop must be at most corpus.size {self.corpus.size}, got {self.vae.crop}"
            )
        return self
