"""The model card of a pretrained model: its figures, measured, and a sheet of samples.

``OUT/tiny_ldm`` is the model; beside its parts are README.md, figures.json and sheet.png. What a
person saw on the sheet is written by hand into ``OUT/notes.md``, which becomes part of the card.
"""

import json
import os
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from models.ldm.files import load_weights
from models.tiny.architecture import TINY_FEW_HEADS
from models.tiny.sample_images import sample_images
from pipeline.base.machine import choose_device
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.export import export_model, load_start
from pipeline.pretrain.ldm import STAGE as LDM_STAGE
from pipeline.pretrain.ldm import LdmObjective, check_phases, open_phases
from pipeline.pretrain.state import find_last_state, read_record
from pipeline.pretrain.vae import STAGE as VAE_STAGE
from pipeline.pretrain.vae import score_vae
from pipeline.runs.step_folders import replace_folder
from pipeline.scenes.looks import LOOKS
from pipeline.scenes.scene import draw_scene
from pipeline.train.log import METRICS

MODEL, START, STORE = "tiny_ldm", "start", "store"
PROMPTS = (
    "red circle",
    "large blue square",
    "large plain yellow star",
    "small green triangle",
    "striped purple ring",
    "large checkered white heart",
    "red circle left of a blue square",
    "yellow cross above a pink heart",
)
_TEXT_PX = 14


def write_card(config: PretrainConfig, out: Path) -> Path:
    """Export the last checkpoint, measure it, sample from it; return the model's folder."""
    check_phases(config.ldm, out / LDM_STAGE)
    with replace_folder(out / MODEL) as folder:
        num_bytes = export_model(out / START, out, folder)
        device = choose_device(None)
        figures: dict[str, Any] = {"psnr_dB": measure_looks(folder, config, device)}
        figures |= measure_denoising(config, out, folder, device)
        figures |= {stage: _count_time(out / stage) for stage in (VAE_STAGE, LDM_STAGE)}
        figures["bytes"] = num_bytes
        (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        prompts = [config.ldm.prompts[0].format(phrase) for phrase in PROMPTS]
        images = sample_images(
            folder,
            prompts,
            num_samples=config.card.num_samples,
            size_px=config.corpus.size,
            num_steps=config.card.num_steps,
            guidance=config.card.guidance,
            seed=config.card.seed,
            device=device,
        )
        draw_sheet(images, prompts).save(folder / "sheet.png")
        path = out / "notes.md"
        notes = path.read_text(encoding="utf-8") if path.exists() else "Nobody has looked yet."
        (folder / "README.md").write_text(format_card(config, figures, notes), encoding="utf-8")
    return out / MODEL


def measure_looks(folder: Path, config: PretrainConfig, device: torch.device) -> dict[str, float]:
    """Mean PSNR in dB over new scenes of every look, those never trained on too."""
    vae = load_weights(AutoencoderKL, folder, "vae").to(device).eval()
    seed, size_px = config.corpus.seed, config.corpus.size
    means = {}
    for look in LOOKS.values():
        images = [
            draw_scene(seed=seed, split="psnr", index=index, size_px=size_px, look=look).image
            for index in range(config.card.num_scenes)
        ]
        means[look.name] = float(score_vae(vae, np.stack(images), device).mean())
    return means


def measure_denoising(
    config: PretrainConfig, out: Path, folder: Path, device: torch.device
) -> dict[str, dict[str, float]]:
    """Denoising loss by timestep on held-out pairs, with their phrases and with the empty prompt.

    How much lower the first is says how much the UNet takes from the text.
    """
    model = load_start(folder).to(device).eval()
    objective = LdmObjective(config.ldm, open_phases(str(out / STORE), config.ldm), device)
    with_text, without = objective.validate(model), objective.validate(model, empty=True)
    return {"denoising_loss": with_text, "denoising_loss_empty_prompt": without}


def _count_time(folder: Path) -> dict[str, float]:
    """Return the steps of a stage's last checkpoint, the hours that they took, and the threads."""
    state = find_last_state(folder)
    assert state is not None
    record = read_record(state)
    seconds, before = 0.0, 0
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        if "steps_per_s" in logged and logged["step"] <= record["step"]:
            seconds += (logged["step"] - before) / logged["steps_per_s"]
            before = logged["step"]
    threads = {name: record[name] for name in ("num_threads",) if name in record}
    return {"steps": record["step"], "hours": seconds / 3600, **threads}


def draw_sheet(images_PNHWC: np.ndarray, prompts: list[str]) -> Image.Image:
    """Draw a row of samples for each prompt, the prompt above it."""
    num_rows, num_samples, height, width, _ = images_PNHWC.shape
    sheet = Image.new("RGB", (num_samples * width, num_rows * (height + _TEXT_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (prompt, images_NHWC) in enumerate(zip(prompts, images_PNHWC, strict=True)):
        top = row * (height + _TEXT_PX)
        draw.text((3, top + 1), prompt, fill="black")
        sheet.paste(Image.fromarray(np.concatenate(images_NHWC, axis=1)), (0, top + _TEXT_PX))
    return sheet


def format_card(config: PretrainConfig, figures: dict[str, Any], notes: str) -> str:
    """Fill the model card, ``templates/card.md.j2``, which is Markdown."""
    phases, left = [], figures[LDM_STAGE]["steps"]
    for phase in config.ldm.phases:  # the last ones may not have been reached
        num_steps = min(phase.num_steps, left)
        left -= num_steps
        if num_steps:
            phases.append((num_steps, phase))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.pretrain"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        config=config,
        figures=figures,
        notes=notes,
        model=TINY_FEW_HEADS,
        phases=phases,
        mean_psnr=statistics.fmean(figures["psnr_dB"][name] for name in config.corpus.looks),
        loss=figures["denoising_loss"],
        empty=figures["denoising_loss_empty_prompt"],
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        threads=figures[LDM_STAGE].get("num_threads"),
        num_cores=os.cpu_count(),
        torch=version("torch"),
        diffusers=version("diffusers"),
    )
