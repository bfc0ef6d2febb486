"""The config of a sweep: a training config, and how its trials vary it.

Data flow: a sweep's file -> the base config with each variant's changes -> the product of the axes
-> a training config for each trial. Fields that a head does not read are set to their defaults, so
that ZNet over ten draws is one trial and not ten.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from models.heads.registry import list_option_names
from pipeline.base.yaml import FrozenModel, SpecError, validate
from pipeline.read.choice import PairChoice
from pipeline.runs.config import HeadName, TrainConfig, refuse_unknown
from pipeline.spec.fields import FeaturesSpec

MAX_TRIALS = 100_000  # a typing error is likelier than so many
BASE = "base"  # the variant's name if none is given
BASELINE_VARIANT = "baselines"  # of the trials that score the baselines and train no head
VALIDATION = "validation"  # the table's name of the pairs of data.validation
_RANGE = re.compile(r"(\d{1,6})\.\.(\d{1,6})")
_PLACES = {  # axis -> where its value goes in a training config
    "head": ("head", "name"),
    "initialise": ("head", "initialise"),
    "blocks": ("head", "blocks"),
    "features": ("data", "features"),
    "draws": ("data", "draws"),
    "learning_rate": ("learning_rate",),
    "num_steps": ("num_steps",),
    "seeds": ("seed",),
}


def _read_range(given: object) -> object:
    """Expand ``1..16`` to the numbers from 1 to 16, both included; return anything else as is."""
    match = _RANGE.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        return given
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MAX_TRIALS:
        raise ValueError(f"a range must be FIRST..LAST with FIRST at most LAST, got {given!r}")
    return tuple(range(first, last + 1))


class Each(FrozenModel):
    """One number for each trial, of a list, a range such as 1..16, or all that the layer holds."""

    each: Annotated[tuple[int, ...] | Literal["all"], BeforeValidator(_read_range)]


def _check_values(values: Any) -> Any:
    listed = values.each if isinstance(values, Each) else values
    if listed is None or isinstance(listed, str):
        return values
    if not listed or len({repr(value) for value in listed}) < len(listed):
        raise ValueError(f"must be one or more values, none of them twice, got {list(listed)}")
    return values


Choices = tuple[tuple[int, ...], ...] | Each


class Axes(BaseModel):
    """The values of which every combination is tried; other fields are the variant's or base's.

    An option of any head is an axis too, by its name, such as ``fusion`` or ``width``.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Annotated[tuple[Any, ...], AfterValidator(_check_values)]] = (
        Field(init=False)
    )

    head: tuple[HeadName, ...] | None = None
    initialise: tuple[Literal["ldm", "random"], ...] | None = None
    blocks: Choices | None = None
    features: dict[str, str] | None = None  # a name for the table -> layer by folder or fingerprint
    draws: Choices | None = None  # stored draws read, by number from 0
    learning_rate: tuple[float, ...] | None = None
    num_steps: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None

    @property
    def ask_for_all(self) -> bool:
        """Whether an axis takes all that the features layer holds."""
        return any(isinstance(a, Each) and a.each == "all" for a in (self.blocks, self.draws))

    @field_validator("*")
    @classmethod
    def _check_fields(cls, values: Any) -> Any:
        return _check_values(values)

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        options = list_option_names()
        if unknown := {x: v for x, v in self.__pydantic_extra__.items() if x not in options}:
            refuse_unknown(self, unknown)
        return self


class Variant(BaseModel):
    """Changes to the base config, its other fields, under a name for the table."""

    model_config = ConfigDict(frozen=True, extra="allow")  # validated with the base

    name: str = Field(min_length=1)


class TestSplit(FrozenModel):
    """Pairs that every trial is scored on besides its validation pairs."""

    __test__ = False  # pytest's, for a class of such a name

    tasks: str  # glob over task ids
    filter: PairChoice = PairChoice()  # of those tasks' pairs
    limit: int = Field(default=1_000_000, ge=1)  # pairs at most, a fixed choice


@dataclass(frozen=True, slots=True)
class TrialConfig:
    """A trial's training config, and its names in the table."""

    config: TrainConfig
    variant: str
    features: str | None  # the features layer's name on its axis

    @property
    def is_baselines(self) -> bool:
        """Whether the baselines are scored, and no head is trained."""
        return self.variant == BASELINE_VARIANT

    @property
    def reads_features(self) -> bool:
        """Whether the head reads the UNet's features."""
        return bool(self.config.head.blocks)


class SweepConfig(FrozenModel):
    """A sweep's file."""

    title: str | None = None  # what the corpus is called in tables and pictures
    base: TrainConfig
    variants: tuple[Variant, ...] = ()
    axes: Axes = Axes()
    tests: dict[str, TestSplit] = Field(default_factory=dict)  # by their name in the table
    heat_map: bool = False  # AP by block and timestep, as a picture

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"variants must have different names, got {names}")
        if VALIDATION in self.tests:
            raise ValueError(f"tests: {VALIDATION!r} is the name of the validation pairs")
        each = isinstance(self.axes.blocks, Each) and isinstance(self.axes.draws, Each)
        if self.heat_map and not each:
            raise ValueError(
                "heat_map needs one block and one draw a trial: give axes.blocks and axes.draws "
                "as {each: …}"
            )
        return self

    def list_layers(self) -> list[str | None]:
        """Return the features layers by folder or fingerprint; None means the store's only one."""
        if self.axes.features is not None:
            return list(self.axes.features.values())
        return list(dict.fromkeys(config.data.features for _, config in self.list_bases()))

    def list_bases(self) -> list[tuple[str, TrainConfig]]:
        """Return the name and the training config of each variant.

        Raises:
            SpecError: a variant's changes do not give a valid training config.
        """
        if not self.variants:
            return [(BASE, self.base)]
        plain = self.base.model_dump(mode="json", exclude_unset=True)
        return [
            (name, validate(_merge(plain, changes or {}), TrainConfig, where=f"variant {name!r}"))
            for name, changes in ((v.name, v.model_extra) for v in self.variants)
        ]

    def list_trials(self, specs: Mapping[str | None, FeaturesSpec]) -> list[TrialConfig]:
        """Return the trials, without duplicates, in the order of the variants and axes' values.

        ``specs`` are those of the ``list_layers`` that exist, for axes that take all.

        Raises:
            SpecError: a combination is no valid training config, or there are too many.
        """
        found: dict[tuple[str, str | None, str], TrialConfig] = {}
        for name, base in self.list_bases():
            for trial in self._cross(name, base, specs):
                found[name, trial.features, trial.config.model_dump_json()] = trial
        return list(found.values())

    def _cross(
        self, name: str, base: TrainConfig, specs: Mapping[str | None, FeaturesSpec]
    ) -> Iterator[TrialConfig]:
        axes = self.axes
        labels: list[str | None] = list(axes.features) if axes.features else [None]
        for label in labels:
            layer = axes.features[label] if axes.features and label else base.data.features
            values = self._list_values(specs.get(layer))
            num = math.prod(map(len, values.values()))
            if num > MAX_TRIALS:
                raise SpecError(f"axes: expected at most {MAX_TRIALS} trials a variant, got {num}")
            if label is not None:
                values["features"] = (layer,)
            for chosen in itertools.product(*values.values()):
                yield _build(name, base, label, dict(zip(values, chosen, strict=True)))

    def _list_values(self, spec: FeaturesSpec | None) -> dict[str, tuple[Any, ...]]:
        values: dict[str, tuple[Any, ...]] = {}
        head, initialise, *others = _PLACES
        # In the order in which they are crossed: the last varies fastest.
        for axis in (head, initialise, *self.axes.__pydantic_extra__, *others):
            given = getattr(self.axes, axis)
            if isinstance(given, Each):
                blocks, num_draws = (spec.blocks, spec.num_draws) if spec else ((), 0)
                stored = blocks if axis == "blocks" else range(num_draws)
                given = tuple((n,) for n in (stored if given.each == "all" else given.each))
            if given is not None and axis != "features":
                values[axis] = given
        return values


def _build(
    variant: str, base: TrainConfig, label: str | None, chosen: Mapping[str, Any]
) -> TrialConfig:
    plain = base.model_dump(mode="json", exclude_unset=True)
    for axis, value in chosen.items():
        *above, last = _PLACES.get(axis, ("head", axis))  # else an option of a head
        section = plain.setdefault(above[0], {}) if above else plain
        section[last] = value
    said = ", ".join(f"{axis} {value}" for axis, value in chosen.items())
    config = validate(plain, TrainConfig, where=f"the trial of {variant} with {said or 'no axes'}")
    plain = config.model_dump(mode="json")
    for path in config.list_unread():  # these fields get their defaults
        place, _, name = path.partition(".")
        plain[place].pop(name, None)
    config = TrainConfig.model_validate(plain)
    return TrialConfig(config, variant, label if config.head.blocks else None)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain config with changes, which may be nested."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged
