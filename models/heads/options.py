"""Options of the heads, as a training config gives them under ``head:``, and a saved head's config.

What configs, sweeps and tables ask about a head is answered here, without loading torch: this
module imports none.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PAPER_BLOCKS = (6, 7, 8, 9, 10)  # the blocks with the most semantics (LD-ZNet, figure 4)
MAX_BLOCK = 64  # no LDM's UNet has as many spatial transformers: SD 1 and 2 have 16, SDXL has 11


class HeadOptions(BaseModel):
    """Options of one head: its own fields beside those that ``head:`` has for every head.

    Every field needs a default, so that a config may name the head alone, and a name that differs
    from those of ``HeadConfig``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Whether ``initialise: ldm`` gives the head weights of the LDM's UNet. Where it does not,
    # ``initialise`` is not read and neither are the UNet's gigabytes of weights.
    starts_from_ldm: ClassVar[bool] = False
    gpu_share: ClassVar[float] = 1.0  # of a GPU, for a trial of a sweep

    def list_blocks(self) -> tuple[int, ...]:
        """Return the blocks whose features the head reads, ascending; none if it reads none."""
        return ()

    def describe(self, *, without: Collection[str] = ()) -> str | None:
        """Return a table's label of the options, such as "width 32, grid none"; None without any.

        Blocks and the names in ``without`` are left out.
        """
        plain = self.model_dump(mode="json", exclude={"blocks", *without})
        said = (f"{name} {'none' if x is None else x}" for name, x in plain.items())
        return ", ".join(said) or None


class BlockOptions(HeadOptions):
    """Options of a head that reads the features of some blocks."""

    blocks: tuple[int, ...] = PAPER_BLOCKS  # by their number in the UNet's forward order, from 1

    def list_blocks(self) -> tuple[int, ...]:
        """Return the blocks whose features the head reads, ascending."""
        return self.blocks

    @field_validator("blocks")
    @classmethod
    def _check_blocks(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        different = len(set(blocks)) == len(blocks)
        if not blocks or not different or min(blocks) < 1 or max(blocks) > MAX_BLOCK:
            raise ValueError(
                "blocks must be different numbers of the UNet's spatial transformers, counted from "
                "1, such as [6, 7] (SD 1 and 2 have 16, SDXL has 11), or left out for "
                f"{list(cls.model_fields['blocks'].default)}, got {list(blocks)}"
            )
        return tuple(sorted(blocks))


class UNetOptions(HeadOptions):
    """ZNet and RGBNet, which have no options."""

    starts_from_ldm = True


class LDZNetOptions(BlockOptions):
    """Options of LD-ZNet."""

    starts_from_ldm = True

    fusion: Literal["attention", "concatenation"] = "attention"  # the paper's is attention


class ProbeOptions(BlockOptions):
    """Options of the probe."""

    gpu_share = 0.25  # it is bound by reading: four share a GPU

    width: int = Field(default=32, ge=1)  # channels of its decoder
    grid: int | None = Field(default=None, ge=1)  # features are averaged to so many a side


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``folder/config.json`` of a saved head.

    Raises:
        ValueError: it is missing, no JSON, or no object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: expected the config of a saved head, got no file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config
