"""What a pretrained model can do, measured: a model card with figures and a sheet of samples.

``OUT/tiny_ldm`` is the model; beside its parts lie README.md, figures.json and sheet.png. What a
person saw on the sheet goes into ``OUT/notes.md`` (Markdown), which the card takes in.
"""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from models.ldm.files import load_weights
from models.tiny.sample_images import sample_images
from models.tiny.write import TINY_FEW_HEADS
from pipeline.base.machine import name_hardware
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.export import export_model, load_start
from pipeline.pretrain.ldm import STAGE as LDM_STAGE
from pipeline.pretrain.ldm import LdmTask, check_phases, open_phases
from pipeline.pretrain.loop import METRICS, find_device
from pipeline.pretrain.state import list_states, read_record
from pipeline.pretrain.vae import STAGE as VAE_STAGE
from pipeline.pretrain.vae import score_vae
from pipeline.runs.step_folders import replace_folder
from pipeline.scenes.looks import LOOKS
from pipeline.scenes.scene import draw_scene

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
    with replace_folder(out / MODEL) as new:
        _write_card(config, out, new)
    return out / MODEL


def _write_card(config: PretrainConfig, out: Path, folder: Path) -> None:
    export_model(out / START, out, folder)
    device = find_device()
    figures: dict[str, Any] = {"psnr_dB": measure_looks(folder, config, device)}
    figures |= measure_denoising(config, out, folder, device)
    figures |= {stage: _count_time(out / stage) for stage in (VAE_STAGE, LDM_STAGE)}
    figures["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
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
    notes = out / "notes.md"
    said = notes.read_text(encoding="utf-8") if notes.exists() else "Nobody has looked yet.\n"
    (folder / "README.md").write_text(format_card(config, figures, said), encoding="utf-8")


def measure_looks(folder: Path, config: PretrainConfig, device: torch.device) -> dict[str, float]:
    """Mean PSNR in dB over new scenes of every look, those never trained on too."""
    vae = load_weights(AutoencoderKL, folder, "vae").to(device).eval()
    means = {}
    for look in LOOKS.values():
        images = [
            draw_scene(
                seed=config.corpus.seed,
                split="psnr",
                index=i,
                size_px=config.corpus.size,
                look=look,
            ).image
            for i in range(config.card.num_scenes)
        ]
        means[look.name] = float(score_vae(vae, np.stack(images), device).mean())
    return means


def measure_denoising(
    config: PretrainConfig, out: Path, folder: Path, device: torch.device
) -> dict[str, dict[str, float]]:
    """Denoising loss by timestep on held-out pairs: with their phrases, and with none.

    How much lower the first is says how much the UNet takes from the text.
    """
    model = load_start(folder).to(device).eval()
    task = LdmTask(config.ldm, open_phases(str(out / STORE), config.ldm), device)
    with_text = task.validate(model)
    without = task.validate(model, empty=True)
    return {"denoising_loss": with_text, "denoising_loss_empty_prompt": without}


def _list_numbers(config: Mapping[str, Any]) -> str:
    return "/".join(str(width) for width in config["block_out_channels"])


def _count_time(folder: Path) -> dict[str, float]:
    """Steps of a stage's last checkpoint, hours spent on them, from its metrics, and threads."""
    state = read_record(list_states(folder)[-1])
    num_steps = int(state["step"])
    seconds, before = 0.0, 0
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "steps_per_s" in record and record["step"] <= num_steps:
            seconds += (record["step"] - before) / record["steps_per_s"]
            before = record["step"]
    threads = {"num_threads": state["num_threads"]} if "num_threads" in state else {}
    return {"steps": num_steps, "hours": seconds / 3600, **threads}


def _describe_machine(ldm: Mapping[str, float]) -> str:
    """What trained the UNet: it is taken to be this machine."""
    if torch.cuda.is_available():
        return f"on {name_hardware(torch.device('cuda'))}"
    threads = f"{ldm['num_threads']} threads at its end, " if "num_threads" in ldm else ""
    return f"{threads}on {os.cpu_count()} shared CPU cores"


def _describe_phases(config: PretrainConfig, num_steps: int) -> str:
    """The steps that were taken, by phase: the last phases may not have been reached."""
    taken, left = [], num_steps
    for phase in config.ldm.phases:
        if not left:
            break
        num, left = min(phase.num_steps, left), max(left - phase.num_steps, 0)
        floor = f" with SNR at least {phase.snr_floor:g} in the weights" if phase.snr_floor else ""
        taken.append(f"{num} of {phase.batch_size} pairs at {phase.size} px{floor}")
    return ", then ".join(taken)


def draw_sheet(images_PNHWC: np.ndarray, prompts: list[str]) -> Image.Image:
    """A row of samples a prompt, the prompt above it."""
    num_rows, num_samples, height, width, _ = images_PNHWC.shape
    sheet = Image.new("RGB", (num_samples * width, num_rows * (height + _TEXT_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        top = row * (height + _TEXT_PX)
        draw.text((3, top + 1), prompt, fill="black")
        for column in range(num_samples):
            image = Image.fromarray(images_PNHWC[row, column])
            sheet.paste(image, (column * width, top + _TEXT_PX))
    return sheet


def format_card(config: PretrainConfig, figures: dict[str, Any], notes: str) -> str:
    """The model card, Markdown."""
    psnr, loss = figures["psnr_dB"], figures["denoising_loss"]
    empty = figures["denoising_loss_empty_prompt"]
    trained = [psnr[name] for name in config.corpus.looks]
    steps = [name for name in loss if name != "error"]
    rows = [f"| {name[1:]} | {loss[name]:.4f} | {empty[name]:.4f} |" for name in steps]
    looks = [
        f"| {name} | {value:.1f} | {'yes' if name in config.corpus.looks else 'no'} |"
        for name, value in psnr.items()
    ]
    vae, ldm = figures[VAE_STAGE], figures[LDM_STAGE]
    phases = _describe_phases(config, int(ldm["steps"]))
    return f"""# A tiny latent diffusion model, trained on drawn scenes

Stable Diffusion 1's classes at a fraction of their width (`models/tiny/write.py`), in diffusers'
layout, float16 safetensors, {figures["bytes"] / 1e6:.1f} MB in all. It exists so that LD-ZNet's
claim, that the inside of a *trained* diffusion model holds semantics, can be looked at on two
cores. It knows nothing but scenes of this project's own; it is of no use for photographs.

- **Data.** {config.corpus.num_train} scenes of `pipeline/scenes/scene.py`,
  {config.corpus.size} px, one to five objects, in {len(config.corpus.looks)} looks
  (`pipeline/scenes/looks.py`):
  {", ".join(config.corpus.looks)}; {config.corpus.few_share:.0%} have one or two. Each comes with
  a caption of the whole and {config.corpus.num_phrases} phrase of a part, as
  "{config.ldm.prompts[0]}". Scene seed {config.corpus.seed}: the demo's scenes are others. All
  combinations of attributes occur, those that the demo keeps from its heads too.
- **Differs from SD 1** in its widths (UNet {_list_numbers(TINY_FEW_HEADS.unet)}, VAE
  {_list_numbers(TINY_FEW_HEADS.vae)}, text {TINY_FEW_HEADS.text["hidden_size"]} of
  {TINY_FEW_HEADS.text["num_hidden_layers"]} layers, a token a word), in 8 groups a norm in place of
  32, and in {TINY_FEW_HEADS.unet["attention_head_dim"]} attention heads in place of 8.
- **Recipe.** `jobs/recipes/pretrain.yaml`. VAE: {vae["steps"]:.0f} steps of {config.vae.batch_size}
  crops of {config.vae.crop} px. UNet and text encoder together, on latents that the project's own
  encode stage stored, {ldm["steps"]:.0f} steps: {phases};
  SD 1.4's schedule, epsilon, Min-SNR weights (gamma {config.ldm.min_snr}),
  {config.ldm.drop_prompt:.0%} dropped prompts, averaged weights.
- **Command.** `ldznet pretrain --out DIR`
- **Time and machine.** VAE {vae["hours"]:.2f} h, UNet and text encoder {ldm["hours"]:.2f} h of
  training, {_describe_machine(ldm)}; torch {version("torch")}, diffusers
  {version("diffusers")}.

## What it gets wrong
{notes.strip()}

## Reconstruction
PSNR over {config.card.num_scenes} scenes of each look that were not trained on, two to five
objects; {np.mean(trained):.1f} dB over the trained looks.

| look | PSNR, dB | trained on |
| --- | --- | --- |
{chr(10).join(looks)}

## Denoising loss by timestep
Mean squared error of ε on held-out pairs, one noise each, with their phrases and with the empty
prompt; {loss["error"]:.4f} and {empty["error"]:.4f} over all timesteps. Predicting nothing gives 1.

| timestep | with the phrase | empty prompt |
| --- | --- | --- |
{chr(10).join(rows)}

## Samples
`sheet.png`: {config.card.num_samples} samples a prompt, none chosen; DDIM, {config.card.num_steps}
steps, guidance {config.card.guidance:g}.
"""
