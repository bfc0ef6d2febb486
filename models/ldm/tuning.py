"""Run options of the frozen model: what makes it faster and may move values within the tolerance.

Neither is in a spec: a layer may be encoded with them on one machine and without on another. How
far each moves values is measured by ``ldznet bench tuning``; docs/models.md has the table.
"""

from dataclasses import dataclass

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

MAX_VARIANTS = 64
"""Shapes that one compiled module class may see; torch's 8 is below SD's kinds of blocks."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """``channels_last``: convolutions' memory format, faster where tensor cores take NHWC.

    ``compile``: torch.compile of each residual and each transformer block, with the batch size
    left open, so that a last, smaller batch compiles nothing anew. Block by block, not as a whole:
    stopping after the last block asked for stays possible, and blocks alike share one compilation.
    """

    channels_last: bool = False
    compile: bool = False


PLAIN = Tuning()


def tune(model: nn.Module, tuning: Tuning) -> None:
    """Apply run options to a VAE or a UNet in place."""
    if tuning.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if tuning.compile:
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, MAX_VARIANTS
        )
        for module in model.modules():
            if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
                module.compile(dynamic=True)
