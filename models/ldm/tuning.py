"""Run options that make the frozen model faster and may move values within the tolerance.

None is in a spec: a layer may be encoded with them on one machine and without on another. How far
each moves values is measured by ``ldznet bench tuning``; docs/models.md has the table. Imports no
torch; ``models.ldm.encoders`` applies them.
"""

from dataclasses import dataclass


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
