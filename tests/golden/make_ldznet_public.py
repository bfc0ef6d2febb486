"""Golden figures from LD-ZNet's public code: its two UNets run on weights drawn by name.

    python tests/golden/make_ldznet_public.py CHECKOUT [--width 32] [--out FOLDER] [--compare]

CHECKOUT is a clone of https://github.com/koutilya-pnvr/LD-ZNet (commit 3d28f76); its code needs
einops and omegaconf. Without ``--out`` nothing is written. ``--compare`` also converts the weights,
runs ours on them and shows the largest differences; at ``--width 320``, SD 1.4's, that takes some
minutes and, with ``--batch 1``, 5 GB of memory.

Every weight is a function of its name and shape, so the test draws the same ones from the names
and shapes in ``names.json`` and needs no checkout. The test takes the functions ``draw_*``,
``list_positions`` and ``hash_names`` from here.

Shape suffixes: B batch, C channels, h/w latent height and width, T text tokens, D text width.
"""

import argparse
import gc
import hashlib
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel

from models.convert.head import convert_head
from models.convert.ldm import build_empty, convert_unet
from models.convert.sort_keys import sort_keys
from models.ldm.blocks import compute_features, list_blocks
from models.ldm.noise import draw_noise

GOLDEN = Path(__file__).parent / "ldznet_public"
TEXT_WIDTHS = {320: 768}
NARROW_TEXT_WIDTH = 48
CASES = {"48x48": (48, 48), "16x24": (16, 24)}
"""Latent sides: those that the attention pools are learned for, and others that resize them."""
TIMESTEPS = (300, 450)
NUM_SAMPLES = 64
UNETS = {
    "head": "ldm_seg.modules.diffusionmodules.ldznet_UNet",
    "frozen": "ldm_seg.modules.diffusionmodules.openaimodel",
}


def draw_weight(name, shape):
    """Draw a weight by its name such that activations stay about 1; none is zero, as some start.

    ``final`` has one channel through seven SiLU: weights above zero keep its signal from fading.
    """
    normal = draw_noise(tuple(shape), seed=0, key=name, view=0, draw=0)
    if name.endswith("positional_embedding"):
        return 0.5 * normal
    if len(shape) > 1:
        spread = shape[0] ** 0.5 / normal.numel() ** 0.5
        return normal.abs() * 1.5 * spread if name.startswith("final.") else normal * spread
    return 0.1 * normal + (0.0 if name.endswith("bias") else 1.0)


def draw_weights(shapes):
    return {name: draw_weight(name, shape) for name, shape in shapes.items()}


def draw_case(case, text_width, batch):
    """Draw the inputs: noisy and clean latent (B, 4, h, w), text (B, 77, D), timesteps (B,)."""
    height, width = CASES[case]

    def draw(key, *shape):
        return draw_noise((batch, *shape), seed=0, key=f"{case} {key}", view=0, draw=0)

    return SimpleNamespace(
        noisy=draw("noisy", 4, height, width),
        latent=draw("latent", 4, height, width),
        text=draw("text", 77, text_width),
        timestep=torch.tensor(TIMESTEPS[:batch]),
    )


def list_positions(num):
    """Return NUM_SAMPLES flat positions below ``num``, spread by a multiplicative hash."""
    return [(i * 2654435761 + 12345) % num for i in range(NUM_SAMPLES)]


def build_public(kind, width):
    """Build a public UNet with random start weights, as configs/ldznet/phrasecut.yaml has it."""
    return importlib.import_module(UNETS[kind]).UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=1 if kind == "head" else 4,
        model_channels=width,
        attention_resolutions=[4, 2, 1],
        num_res_blocks=2,
        channel_mult=[1, 2, 4, 4],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=TEXT_WIDTHS.get(width, NARROW_TEXT_WIDTH),
        use_checkpoint=False,
        legacy=False,
    )


def list_shapes(kind, width):
    """Return the names and shapes of a public UNet's weights, and its EMA's names, hashed."""
    ema_class = importlib.import_module("ldm_seg.modules.ema").LitEma
    with torch.device("meta"):
        unet = build_public(kind, width)
    wrapper = torch.nn.Module()
    wrapper.diffusion_model = unet
    ema = [name for name, _ in ema_class(wrapper).named_buffers()]
    shapes = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
    return shapes, hash_names(ema)


def hash_names(names):
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


@torch.no_grad()
def run_public(kind, width, weights, inputs, features=None):
    """Run a public UNet on each case; return what it returns: {case: (output, features)}."""
    with torch.device("meta"):
        unet = build_public(kind, width)
    unet.load_state_dict(weights, assign=True)
    unet.eval()
    outputs = {}
    for case, given in inputs.items():
        if kind == "frozen":
            outputs[case] = unet(given.noisy, given.timestep, context=given.text)
        else:
            zero = torch.zeros_like(given.timestep)
            outputs[case] = unet(
                given.latent, zero, context=given.text, sd_features=list(features[case])
            )
    return outputs


@torch.no_grad()
def run_our_unet(weights, inputs):
    """Run a diffusers UNet on converted weights; return {case: {block number: feature}}."""
    model = convert_unet(weights)
    unet = build_empty("unet", UNet2DConditionModel, model.config)
    unet.load_state_dict(model.weights, assign=True)
    return {
        case: compute_features(unet, i.noisy, i.timestep, i.text, blocks=list_blocks(unet))
        for case, i in inputs.items()
    }


@torch.no_grad()
def run_our_head(state, inputs, features):
    """Run the converted head; return {case: logits}."""
    head = convert_head(sort_keys(state)).eval()
    return {
        case: head(latent=i.latent, text=i.text, features=features[case])
        for case, i in inputs.items()
    }


def sample(tensor):
    """Return what a golden file keeps of a tensor."""
    flat = tensor.flatten()
    values = [float(flat[i]) for i in list_positions(flat.numel())]
    return {
        "shape": list(tensor.shape),
        "max": float(flat.abs().max()),
        "std": float(flat.std()),
        "values": values,
    }


def write_golden(folder, width, names, ema, cases):
    """Write the shapes as text ("128x64x3x3"), so that each name is a line."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {
        kind: {name: "x".join(map(str, shape)) for name, shape in found.items()}
        for kind, found in names.items()
    }
    figures = {"width": width, "batch": len(TIMESTEPS), "ema_names_sha256": ema, "cases": cases}
    for file, content in (("names.json", shapes), ("values.json", figures)):
        (folder / file).write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


def show_differences(title, theirs, ours):
    """Write a row a tensor: the largest difference over the largest value, over all cases."""
    for name in theirs[next(iter(theirs))]:
        ratios = [
            float((ours[case][name] - wanted[name]).abs().max() / wanted[name].abs().max())
            for case, wanted in theirs.items()
        ]
        cells = " | ".join(f"{ratio:.1e}" for ratio in ratios)
        sys.stdout.write(f"| {title} {name} | {cells} |\n")


def make(width, batch, *, compare):
    """Run both public UNets, and ours where ``compare``; return what write_golden writes."""
    text_width = TEXT_WIDTHS.get(width, NARROW_TEXT_WIDTH)
    inputs = {case: draw_case(case, text_width, batch) for case in CASES}
    names, ema = {}, {}
    for kind in UNETS:
        names[kind], ema[kind] = list_shapes(kind, width)
    weights = draw_weights(names["frozen"])
    frozen = run_public("frozen", width, weights, inputs)
    theirs = {case: dict(enumerate(found, start=1)) for case, (_, found) in frozen.items()}
    if compare:
        sys.stdout.write(f"| width {width} | {' | '.join(inputs)} |\n| --- | --- | --- |\n")
        ours = run_our_unet(weights, inputs)
        show_differences("block", theirs, ours)
    del weights
    gc.collect()
    weights = draw_weights(names["head"])
    found = {case: output[1] for case, output in frozen.items()}
    logits = {
        case: out[0] for case, out in run_public("head", width, weights, inputs, found).items()
    }
    if compare:
        state = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
        our_logits = run_our_head(state, inputs, ours)
        show_differences(
            "head",
            {c: {"logits": v} for c, v in logits.items()},
            {c: {"logits": v} for c, v in our_logits.items()},
        )
    cases = {
        case: {"logits": sample(logits[case])}
        | {str(number): sample(feature) for number, feature in theirs[case].items()}
        for case in CASES
    }
    return names, ema, cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--width", type=int, default=32, help="channels of the first level")
    parser.add_argument("--batch", type=int, default=len(TIMESTEPS))
    parser.add_argument("--out", type=Path, help=f"folder to write to; committed: {GOLDEN}")
    parser.add_argument("--compare", action="store_true", help="run ours too, show differences")
    options = parser.parse_args()
    sys.path.insert(0, str(options.checkout))
    torch.set_num_threads(1)
    names, ema, cases = make(options.width, options.batch, compare=options.compare)
    for case, found in cases.items():
        logits = found["logits"]
        sys.stdout.write(f"{case}: logits std {logits['std']:.3g}, max {logits['max']:.3g}\n")
    if options.out:
        write_golden(options.out, options.width, names, ema, cases)


if __name__ == "__main__":
    main()
