"""Encodes the scenes with the trained VAE into a store, without Ray.

The layer's model is a whole diffusers folder. Its text encoder, which encoding needs too, and its
UNet are untrained: training starts from them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from models.tiny.architecture import TINY_FEW_HEADS
from models.tiny.untrained import build_text_encoder, build_unet
from models.tiny.write import measure_scaling_factor, write_components, write_words
from pipeline.base.whole_file import write_new_folder
from pipeline.base.yaml import SpecError
from pipeline.encode.actor_pool import ActorBounds
from pipeline.encode.prepare import prepare_encode
from pipeline.encode.run import run_encode
from pipeline.pretrain.config import LdmConfig
from pipeline.pretrain.corpus import list_caption_words
from pipeline.spec.fields import LatentsSpec, Spec

_MADE_FROM = "made_from.json"
_BATCH = 16  # views a VAE pass
_CALIBRATION = 64  # images that the scaling factor is measured on


def write_start(
    folder: Path, vae: AutoencoderKL, images_NHWC: np.ndarray, *, seed: int, vae_step: int
) -> None:
    """Write the model folder that encoding and training start from, unless it is there.

    ``images_NHWC`` uint8: the VAE's scaling factor is 1 / std of its latents over some of them.

    Raises:
        SpecError: the folder that is there has the VAE of another step.
    """
    if folder.exists():
        made_from = folder / _MADE_FROM  # folders of earlier versions have none
        made = json.loads(made_from.read_bytes())["vae_step"] if made_from.exists() else vae_step
        if made != vae_step:
            raise SpecError(
                f"{folder}: was made from the VAE's step {made}, which is now at {vae_step}; "
                f"remove {folder.name}, store and ldm beside it to begin anew from the new VAE, or "
                "give the config that made it"
            )
        return
    step = max(len(images_NHWC) // _CALIBRATION, 1)
    calibration = torch.from_numpy(np.array(images_NHWC[::step][:_CALIBRATION]))
    with write_new_folder(folder) as new:
        text_config = write_words(new, list_caption_words())
        write_components(
            new,
            unet=build_unet(seed),
            vae=vae,
            text_encoder=build_text_encoder(seed, text_config),
            text_config=text_config,
            scaling_factor=measure_scaling_factor(vae, calibration),
            architecture=TINY_FEW_HEADS,
        )
        (new / _MADE_FROM).write_text(json.dumps({"vae_step": vae_step}) + "\n", encoding="utf-8")


def encode_phases(
    corpus: Path, model: Path, store: str, config: LdmConfig, *, say: Callable[[str], None]
) -> None:
    """Encode what each phase reads and the store lacks, a latents layer for each size.

    Raises:
        RuntimeError: a task failed.
    """
    train, validation = (sorted(corpus.glob(f"pretrain-{x}-*.tar")) for x in ("train", "val"))
    for phase in config.phases:
        latents = LatentsSpec(
            model=str(model), size=phase.size, crop="resize", prompts=config.prompts[:1]
        )
        tars = [str(path) for path in (*train[: phase.num_tars], *validation)]
        run = prepare_encode(Spec(latents=latents), tars, store, batch=_BATCH)
        say(f"encoding at {phase.size} px: {run.describe()}")
        totals = run_encode(run, metrics_path=None, actors=ActorBounds(0, 0), max_failures=0)
        if totals.failures:
            raise RuntimeError(
                f"{store}: encoding failed; what is committed stays: run --stage encode again\n"
                f"{totals.describe()}"
            )
