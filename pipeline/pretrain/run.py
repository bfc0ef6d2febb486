"""Pretraining the tiny latent diffusion model, stage by stage, in one folder.

``corpus`` draws scenes in several looks, as tars. ``vae`` trains the VAE on their pixels.
``encode`` writes it with a new text encoder and UNet as a diffusers folder and encodes the corpus
with that. ``ldm`` trains UNet and text encoder from the store. ``card`` exports the averaged
weights with figures and samples. A stage that is complete is not done again.
"""

import json
from collections.abc import Callable
from pathlib import Path

from models.tiny.untrained import build_vae
from pipeline.base.whole_file import write_whole
from pipeline.base.yaml import SpecError
from pipeline.pretrain.card import START, STORE, write_card
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.corpus import write_captioned
from pipeline.pretrain.encode import encode_phases, write_start
from pipeline.pretrain.export import load_start
from pipeline.pretrain.ldm import train_ldm
from pipeline.pretrain.state import find_last_state, load_average, read_record
from pipeline.pretrain.vae import STAGE as VAE_STAGE
from pipeline.pretrain.vae import open_images, train_vae
from pipeline.runs.lock import RunLock
from pipeline.runs.resume import list_changes

CORPUS = "corpus.json"
STAGES = ("corpus", "vae", "encode", "ldm", "card")


def run_pretrain(
    config: PretrainConfig, out: Path, *, stage: str, resume: bool, say: Callable[[str], None]
) -> Path:
    """Run one stage, or all; return the model's folder after ``card``, else ``out``.

    Raises:
        SpecError: no such stage, a run that is there without ``resume``, or another config.
        RunHeldError: another run trains under ``out``.
    """
    if stage not in (*STAGES, "all"):
        raise SpecError(f"--stage: expected one of {', '.join(STAGES)} or all, got {stage!r}")
    out.mkdir(parents=True, exist_ok=True)
    with RunLock(out, "pretrain"):
        _pin_corpus(config, out)
        stages = STAGES if stage == "all" else (stage,)
        if "corpus" in stages:
            say(f"drawing {config.corpus.num_train + config.corpus.num_validation} scenes")
            write_captioned(out / "corpus", config.corpus)
        if "vae" in stages:
            say(f"training the VAE: {config.vae.num_steps} steps")
            train, validation = open_images(out, "train"), open_images(out, "val")
            train_vae(config.vae, train, validation, out, resume=resume)
        if "encode" in stages:
            encode_scenes(config, out, say)
        if "ldm" in stages:
            say(f"training UNet and text encoder: {config.ldm.num_steps} steps")
            model = load_start(out / START)
            train_ldm(config.ldm, str(out / STORE), model, out, resume=resume)
        if "card" in stages:
            say("exporting, measuring and sampling")
            return write_card(config, out)
    return out


def _pin_corpus(config: PretrainConfig, out: Path) -> None:
    """Write down the corpus that a folder belongs to, so that two are never mixed.

    Raises:
        SpecError: the folder belongs to another one.
    """
    path, plain = out / CORPUS, config.corpus.model_dump(mode="json")
    if not path.exists():
        write_whole(path, json.dumps(plain, indent=1) + "\n")
        return
    pinned = json.loads(path.read_text(encoding="utf-8"))
    changed = list_changes(pinned, plain)
    if changed:
        raise SpecError(
            f"{path}: the corpus is another: "
            f"{'; '.join(map(str, changed))}; give its config, or another --out"
        )


def encode_scenes(config: PretrainConfig, out: Path, say: Callable[[str], None]) -> None:
    """Write the folder that training starts from, and encode the scenes with it.

    Raises:
        SpecError: the VAE's training is not finished, or the folder has the VAE of another step.
    """
    state = find_last_state(out / VAE_STAGE)
    step = int(read_record(state)["step"]) if state is not None else 0
    if state is None or step < config.vae.num_steps:
        raise SpecError(
            f"{out / VAE_STAGE}: expected a VAE of {config.vae.num_steps} steps, got {step}; run "
            "--stage vae --resume first"
        )
    vae = build_vae(config.vae.seed)
    load_average(state, vae)
    images = open_images(out, "train")
    write_start(out / START, vae, images, seed=config.ldm.seed, vae_step=step)
    encode_phases(out / "corpus", out / START, str(out / STORE), config.ldm, say=say)
