"""What a training run is: the head, the data it reads, and how it is fitted. Loads no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from models.heads.options import HeadOptions
from models.heads.registry import HEADS, find_options_class, list_option_names
from pipeline.base.yaml import FrozenModel, SpecError
from pipeline.read.choice import PairChoice
from pipeline.spec.layer import LayerSpec


def _check_name(name: str) -> str:
    if name not in HEADS:
        raise ValueError(f"must be one of {list(HEADS)}, got {name!r}")
    return name


HeadName = Annotated[str, AfterValidator(_check_name)]


def _make_absolute(model: str) -> str:
    """Return a folder's path as Ray's workers need it, who stand elsewhere; a hub id as it is."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


ModelPlace = Annotated[str, AfterValidator(_make_absolute)]


def refuse_unknown(section: BaseModel, unknown: Mapping[str, Any]) -> None:
    """Raise a ValidationError for fields that neither a section nor any head's options have."""
    own = [field.alias or name for name, field in type(section).model_fields.items()]
    known = ", ".join(dict.fromkeys([*own, *list_option_names()]))
    fault = PydanticCustomError("unknown", "no such field; there are {known}", {"known": known})
    faults = [InitErrorDetails(type=fault, loc=(x,), input=unknown[x]) for x in unknown]
    raise ValidationError.from_exception_data(type(section).__name__, faults)


class HeadStart(FrozenModel):
    """The checkpoint whose averaged weights a head starts from: what a config's ``from`` names."""

    checkpoint: str  # its folder, absolute
    sha256: str  # of its weights
    name: HeadName
    options: dict[str, Any]  # those that it was trained with


class HeadConfig(BaseModel):
    """Which head, from where its weights start, and its options beside these fields.

    Options that only other heads have are checked but not read: a sweep over several heads shares
    one section. With ``from``, name and options are the checkpoint's.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Any] = Field(init=False)

    name: HeadName
    initialise: Literal["ldm", "random"] = "ldm"  # from the LDM's UNet, as the paper, or afresh
    model: ModelPlace | None = None  # the LDM's folder, where it is not where the layer says
    start_at_prior: bool = True  # last bias at the logit of the training masks' mean area
    from_: HeadStart | None = Field(default=None, alias="from")  # start_at_prior is not read then

    @property
    def options(self) -> HeadOptions:
        """The options of the head's own class."""
        kind, given = find_options_class(self.name), self.__pydantic_extra__
        if self.from_ is not None:
            given = given | self.from_.options
        return kind(**{name: given[name] for name in given if name in kind.model_fields})

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks whose features the head reads; none where it reads no features."""
        return self.options.list_blocks()

    def list_unread(self) -> set[str]:
        """Return the given fields that this head does not read."""
        unread = self.__pydantic_extra__.keys() - type(self.options).model_fields.keys()
        if self.from_ is not None:
            return unread | {"initialise", "start_at_prior"}
        return unread if self.options.starts_from_ldm else unread | {"initialise"}

    def __eq__(self, other: object) -> bool:
        """Compare what is used: an option given at its default equals one that is left out."""
        return isinstance(other, HeadConfig) and self.model_dump() == other.model_dump()

    @model_validator(mode="before")
    @classmethod
    def _take_name(cls, given: Any) -> Any:
        start = given.get("from") if isinstance(given, Mapping) else None
        if isinstance(start, Mapping) and given.get("name") is None:
            return {**given, "name": start.get("name")}
        return given

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        """Check each option by the head's own class, or else by the first that has it."""
        given = self.__pydantic_extra__
        left = dict(given)
        for kind in map(find_options_class, (self.name, *HEADS)):
            if left:
                of_kind = {name: left.pop(name) for name in kind.model_fields if name in left}
                given.update(kind(**of_kind).model_dump(exclude_unset=True))
        if left:
            refuse_unknown(self, left)
        if self.from_ is not None:
            self._check_start(self.from_)
        return self

    def _check_start(self, start: HeadStart) -> None:
        """Refuse a name or an option that is not the checkpoint's, and weights of another start."""
        options = find_options_class(start.name)(**start.options).model_dump()
        theirs = {"name": start.name, "initialise": "ldm"} | options
        ours = {"name": self.name, "initialise": self.initialise} | self.__pydantic_extra__
        if changed := [name for name in ours if name in theirs and ours[name] != theirs[name]]:
            said = "; ".join(f"{name} {theirs[name]}, got {ours[name]}" for name in changed)
            raise ValueError(
                f"from: {start.checkpoint} has {said}; leave {', '.join(changed)} out, or from"
            )

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Fill in the defaults of the head's own options, so that a record has what was used."""
        unset, defaults = info.exclude_unset, info.exclude_defaults
        own = self.options.model_dump(
            mode=info.mode, exclude_unset=unset, exclude_defaults=defaults
        )
        names = type(self.options).model_fields
        found = {name: x for name, x in dump(self).items() if name not in names} | own
        start = found.pop("from_", None)
        if start is None:
            return found
        if unset:  # what the checkpoint says is not given: a variant may name another one
            found = {name: x for name, x in found.items() if name not in {"name", *names}}
        return {**found, "from": start}


class DataConfig(FrozenModel):
    """Which pairs. Task globs are over task ids, which start with their tar's stem."""

    train: str = "*train*"  # tasks trained on
    validation: str = "*val*"  # tasks evaluated on
    latents: str | None = None  # layer by folder or fingerprint; needed where there are several
    features: str | None = None
    snapshot: str | None = None  # as `ldznet snapshot` names it; else what is committed at start
    train_filter: PairChoice = PairChoice()  # of those tasks' pairs: by area, phrase, key's hash
    validation_filter: PairChoice = PairChoice()
    views: Literal["every", "one"] = "every"  # of a phrase's stored crops and mirrors, an epoch
    draws: tuple[int, ...] | None = None  # stored draws that are read, from 0; None: all
    order: Literal["global", "windowed"] = "global"  # windowed: for shards in an object store
    window: int = Field(default=16, ge=1)  # runs shuffled together: tasks, or parts of 4096 pairs

    @model_validator(mode="after")
    def _draws_differ(self) -> Self:
        draws = self.draws
        if draws is not None and (not draws or min(draws) < 0 or len(set(draws)) < len(draws)):
            raise ValueError(
                "draws must be different numbers of stored draws, counted from 0, such as [0, 2], "
                f"or null for all, got {list(draws)}"
            )
        return self


class TrainConfig(FrozenModel):
    """A training config file. Defaults are the paper's (PNVR et al., LD-ZNet, ICCV 2023, section 4)
    where it states one."""

    head: HeadConfig
    data: DataConfig = DataConfig()
    num_steps: int = Field(ge=1)  # optimizer steps
    batch_size: int = Field(default=32, ge=1)  # pairs a step, over workers and accumulation
    accumulate: int = Field(default=1, ge=1)  # passes that a worker's share of a step is cut into
    # The paper's learning rate: 5e-7 x batch x GPUs.
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=0, ge=0)  # linear from 0; changed on --resume: from there
    schedule: Literal["constant", "cosine", "plateau"] = "constant"  # after the warm-up
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)  # AdamW's default
    clip_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # of all gradients together
    ema_decay: float = Field(default=0.999, ge=0, lt=1)  # of the weights that are evaluated
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU
    gradient_checkpointing: bool = False
    log_every: int = Field(default=10, ge=1)  # steps a loss record
    validate_every: int = Field(default=500, ge=1)  # steps
    validation_pairs: int = Field(default=256, ge=1)  # the first so many of the validation order
    negatives: bool = False  # score negatives too: the share with a false answer
    overlays: bool = True  # pictures of eight fixed validation pairs at each validation
    best_by: Literal["mIoU", "IoU_FG", "AP"] = "IoU_FG"  # of validation: OUT/best, the plateau
    checkpoint_every: int = Field(default=500, ge=1)  # steps; the last step always has one
    keep_checkpoints: int = Field(default=2, ge=1)  # the newest so many, and the best
    loader_workers: int = Field(default=2, ge=1)  # threads a worker that read batches ahead
    trace_pairs: bool = False  # write the pairs of each step to OUT/pairs-<rank>.jsonl
    seed: int = 0  # of new weights, order and draws

    def uses_bfloat16(self, device_type: str) -> bool:
        """Return whether forward passes on "cpu" or "cuda" are under bfloat16."""
        return self.precision == "bfloat16" or (self.precision == "auto" and device_type == "cuda")

    def list_unread(self) -> set[str]:
        """Return the fields, by dotted path, that the head does not read."""
        unread = {f"head.{name}" for name in self.head.list_unread()}
        return unread if self.head.blocks else unread | {"data.draws", "data.features"}

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate must be at most batch_size {self.batch_size}, so that every pass has "
                f"a pair, got {self.accumulate}"
            )
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps must be below num_steps {self.num_steps}, got {self.warmup_steps}"
            )
        return self


def list_draws(data: DataConfig, features: LayerSpec | None) -> tuple[int, ...]:
    """Return the stored draws that are read, (0,) without features; SpecError if not stored."""
    if features is None:
        return (0,)
    num_draws = features.features.num_draws
    if data.draws is None:
        return tuple(range(num_draws))
    if max(data.draws) >= num_draws:
        raise SpecError(
            f"data.draws: {features.folder} stores {num_draws} draws a pair, numbered from 0, got "
            f"{list(data.draws)}; choose among {list(range(num_draws))}, or leave draws out"
        )
    return data.draws
