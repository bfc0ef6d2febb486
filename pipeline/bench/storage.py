"""Error of each form in which features can be stored, compared with float32.

Data flow: views of a corpus -> posterior means and prompt embeddings -> float32 features of some
draws -> each storage form and back -> the error of each block and form.

Shape suffixes: B batch, C channels, h/w a block's height and width.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.ldm.encoders import FeatureEncoder, LatentEncoder
from models.ldm.noise import draw_noise
from models.ldm.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from pipeline.corpus.members import group_members
from pipeline.corpus.source import open_source
from pipeline.corpus.tar import list_members
from pipeline.corpus.tasks import list_tasks
from pipeline.decode.pairs import View
from pipeline.decode.pool import SampleDecoder
from pipeline.spec.fields import LatentsSpec

TIMESTEPS = (300, 400, 500)
BATCH = 8


@dataclass(frozen=True, slots=True)
class StorageRow:
    """Error of one storage form for one block, over all features.

    ``relative_rms`` is rms(x - x') / rms(x); ``relative_max`` is max|x - x'| / max|x|.
    """

    block: int
    form: str
    draw_bytes: int
    relative_rms: float
    relative_max: float


def _float16(feature: Tensor) -> tuple[Tensor, int]:
    half = feature.half()
    return half.float(), half.nbytes


def _int8(feature: Tensor) -> tuple[Tensor, int]:
    values, scale = quantize_int8(feature)
    return dequantize_int8(values, scale), values.nbytes + scale.nbytes


def _int4(feature: Tensor) -> tuple[Tensor, int]:
    packed, scale = quantize_int4(feature)
    restored = dequantize_int4(packed, scale, shape=tuple(feature.shape))
    return restored, packed.nbytes + scale.nbytes


FORMS: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {
    "float16": _float16,
    "int8": _int8,
    "int4": _int4,
}
"""A form's name to a function: features (B, C, h, w) float32 to what is read back, and its bytes.
"""


@dataclass(slots=True)
class _Sums:
    draw_bytes: int = 0
    squared_error: float = 0.0
    squared: float = 0.0
    largest_error: float = 0.0
    largest: float = 0.0


class StorageErrors:
    """Adds up the error of every form, by block."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[int, str], _Sums] = defaultdict(_Sums)

    def add(self, features: Mapping[int, Tensor]) -> None:
        """Add features (B, C, h, w) float32, by block number."""
        for number, feature in features.items():
            for form, store in FORMS.items():
                restored, num_bytes = store(feature)
                error = (restored - feature).double()
                sums = self._sums[number, form]
                sums.draw_bytes = num_bytes // len(feature)
                sums.squared_error += float(error.square().sum())
                sums.squared += float(feature.double().square().sum())
                sums.largest_error = max(sums.largest_error, float(error.abs().max()))
                sums.largest = max(sums.largest, float(feature.abs().max()))

    def rows(self) -> list[StorageRow]:
        """Return one row for each block and form."""
        return [
            StorageRow(
                block=number,
                form=form,
                draw_bytes=sums.draw_bytes,
                relative_rms=(sums.squared_error / sums.squared) ** 0.5,
                relative_max=sums.largest_error / sums.largest,
            )
            for (number, form), sums in sorted(self._sums.items(), key=lambda item: item[0][0])
        ]


def measure_storage(
    model: Path, views: Sequence[View], *, blocks: Sequence[int], seed: int = 0
) -> list[StorageRow]:
    """Measure the error of each storage form against float32 features of some views.

    A view is encoded with the prompt of its first pair, once at each of ``TIMESTEPS``, from the
    posterior mean and the embedding in float32.

    Raises:
        ValueError: no views, or the model has not these blocks.
    """
    if not views:
        raise ValueError("bench storage: expected at least one view, got none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents = LatentEncoder.from_pretrained(model, device=device)
    encoder = FeatureEncoder.from_pretrained(model, blocks=blocks, device=device)
    errors = StorageErrors()
    for start in range(0, len(views), BATCH):
        some = views[start : start + BATCH]
        mean, _ = latents.encode_image(torch.from_numpy(np.stack([view.image for view in some])))
        text = latents.encode_text([view.pairs[0].prompt for view in some])
        for draw, timestep in enumerate(TIMESTEPS):
            noise = [
                draw_noise(
                    tuple(mean.shape[1:]), seed=seed, key=v.source.key, view=v.number, draw=draw
                )
                for v in some
            ]
            timesteps = torch.full((len(some),), timestep)
            latent = mean * latents.scaling_factor
            errors.add(encoder.encode_features(latent, torch.stack(noise), timesteps, *text))
    return errors.rows()


def read_views(patterns: Sequence[str], spec: LatentsSpec, *, num: int) -> list[View]:
    """Read ``num`` views of a corpus: about as many from each of its tars.

    Raises:
        CorpusError: a pattern matches nothing.
        DamagedTarError: a tar's framing is broken.
    """
    tasks = [task for task in list_tasks(patterns) if not task.fault]
    share = -(-num // len(tasks))
    views: list[View] = []
    with SampleDecoder() as decoder:
        for task in tasks:
            with ExitStack() as stack:
                file, _ = stack.enter_context(open_source(task))
                groups, *_ = group_members(list_members(file, num_bytes=task.num_bytes))
                decoded = decoder.decode_views(file, groups, spec, max_bytes=1)  # one at a time
                samples = stack.enter_context(closing(decoded))
                found = (view for sample in samples for view in sample.views)
                views += islice(found, min(share, num - len(views)))
    return views
