"""What a training run is: the head, the data it reads, and how it is fitted."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadConfig(_Frozen):
    """Which head, and from where its weights start."""

    name: Literal["rgbnet", "znet", "ldznet", "probe"]
    initialise: Literal["ldm", "random"] = "ldm"  # from the LDM's UNet, as the paper, or afresh
    blocks: tuple[int, ...] = (6, 7, 8, 9, 10)  # features that LD-ZNet or a probe reads
    fusion: Literal["attention", "concatenation"] = "attention"  # LD-ZNet's; the paper's is first
    width: int = Field(default=32, ge=1)  # channels of a probe's decoder
    model: str | None = None  # the LDM's folder, where it is not where the layer says
    start_at_prior: bool = True  # last bias at the logit of the training masks' mean area


class DataConfig(_Frozen):
    """Which pairs. Task globs are over task ids, which start with their tar's stem."""

    train: str = "*train*"  # tasks trained on
    validation: str = "*val*"  # tasks evaluated on
    latents: str | None = None  # layer by folder or fingerprint; needed where there are several
    features: str | None = None
    snapshot: str | None = None  # as `ldznet snapshot` names it; else what is committed at start


class TrainConfig(_Frozen):
    """A training config file. Defaults are the paper's where LDZNET.md states one."""

    head: HeadConfig
    data: DataConfig = DataConfig()
    num_steps: int = Field(ge=1)  # optimizer steps
    batch_size: int = Field(default=32, ge=1)  # pairs a step, over all workers
    learning_rate: float = Field(default=2e-4, gt=0)  # the paper: 5e-7 x batch x GPUs
    warmup_steps: int = Field(default=0, ge=0)  # linear from 0
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine to 0
    weight_decay: float = Field(default=0.01, ge=0)  # AdamW's default, as the public code
    clip_norm: float = Field(default=1.0, gt=0)  # of the gradients of all parameters
    ema_decay: float = Field(default=0.999, ge=0, lt=1)  # of the weights that are evaluated
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU
    gradient_checkpointing: bool = False
    log_every: int = Field(default=10, ge=1)  # steps a loss record
    validate_every: int = Field(default=500, ge=1)  # steps
    validation_pairs: int = Field(default=256, ge=1)  # the first so many of the validation order
    checkpoint_every: int = Field(default=500, ge=1)  # steps; the last step always has one
    seed: int = 0  # of new weights, order and draws

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainConfig":
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps must be below num_steps {self.num_steps}, got {self.warmup_steps}"
            )
        return self
