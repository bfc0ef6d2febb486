"""A narrow Stable Diffusion and LD-ZNet in CompVis's layout, for the tests of conversion.

The names are turned back from diffusers' by rules of this file alone, for SD 1's shape: four levels
of two residual blocks. Widths are multiples of the 32 groups that CompVis's norms have.
"""

import json
import re

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from models.heads.ldznet import LDZNet
from models.heads.znet import ZNet
from models.tiny.architecture import TINY, Architecture
from models.tiny.write import write_tiny_ldm

WORDS = ["red", "blue", "circle", "square", "photo", "a", "of"]
FROZEN = "sd_features_stage_model.model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCKS = {7: "middle_block.1"} | {
    number: place
    for numbers, row in (
        ((1, 2, 3, 4, 5, 6), (1, 2, 4, 5, 7, 8)),
        ((8, 9, 10, 11, 12, 13, 14, 15, 16), (3, 4, 5, 6, 7, 8, 9, 10, 11)),
    )
    for number, place in zip(
        numbers,
        (f"{'input' if numbers[0] == 1 else 'output'}_blocks.{n}.1" for n in row),
        strict=True,
    )
}


def write_narrow_ldm(folder, *, seed=0):
    """The tiny model at widths that CompVis's code could have."""
    architecture = Architecture(
        {**TINY.unet, "block_out_channels": [32, 64, 64, 64], "norm_num_groups": 32},
        {**TINY.vae, "block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32},
        {**TINY.text, "num_attention_heads": 1},
    )
    write_tiny_ldm(folder, words=WORDS, seed=seed, architecture=architecture)


def unet_to_compvis(name):
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    stage, _, rest = name.partition(".")
    if stage == "mid_block":
        part, number, inner = rest.split(".", 2)
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(number)}"
    else:
        level, part, number, inner = rest.split(".", 3)
        down = stage == "down_blocks"
        row = 3 * int(level) + int(number) + (1 if down else 0)
        if part == "downsamplers":
            return f"input_blocks.{3 * int(level) + 3}.0.{inner.replace('conv', 'op')}"
        if part == "upsamplers":
            return f"output_blocks.{3 * int(level) + 2}.{1 if level == '0' else 2}.{inner}"
        place = f"{'input' if down else 'output'}_blocks.{row}.{int(part == 'attentions')}"
    if part == "attentions":
        return f"{place}.{inner}"
    inner, _, kind = inner.rpartition(".")
    return f"{place}.{_RESNET[inner]}.{kind}"


def vae_to_compvis(name, tensor):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    up = re.search(r"up_blocks\.(\d)", name)
    if up:
        name = name.replace(up[0], f"up.{3 - int(up[1])}")
        name = name.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
    name = name.replace("mid_block.resnets.0", "mid.block_1")
    name = name.replace("mid_block.resnets.1", "mid.block_2")
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        name = name.replace("group_norm", "norm").replace("to_out.0", "proj_out")
        name = re.sub(r"\.to_([qkv])\.", r".\1.", name)
        tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return name, tensor


def with_ema(weights, prefix="", *, ema=True, raw=False):
    """``weights`` as the moving averages, and raw weights beside them that are others.

    With ``raw`` they are the raw ones, and the averages others.
    """
    if not ema:
        return {f"{prefix}model.diffusion_model.{name}": value for name, value in weights.items()}
    state = {f"{prefix}model_ema.decay": torch.tensor(0.9999)}
    state[f"{prefix}model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    for name, tensor in weights.items():
        own, copy = (tensor, tensor + 1.0) if raw else (tensor + 1.0, tensor)
        state[f"{prefix}model.diffusion_model.{name}"] = own
        state[f"{prefix}model_ema.{('diffusion_model.' + name).replace('.', '')}"] = copy
    return state


def schedule_buffers():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return {"betas": betas.float(), "alphas_cumprod": alphas.float(), "logvar": torch.zeros(1000)}


def read_unet(folder):
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return {unet_to_compvis(name): tensor for name, tensor in weights.items()}


def read_rest(folder):
    """VAE and text encoder of a diffusers folder, under CompVis's names."""
    state = {}
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        name, tensor = vae_to_compvis(name, tensor)
        state[f"first_stage_model.{name}"] = tensor
    for name, tensor in load_file(folder / "text_encoder/model.safetensors").items():
        state[f"cond_stage_model.transformer.{name}"] = tensor
    ids = torch.arange(77)[None]
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids
    return state


def to_compvis(folder):
    """The state_dict of a CompVis checkpoint with a diffusers folder's weights."""
    return {**schedule_buffers(), **with_ema(read_unet(folder)), **read_rest(folder)}


def build_head(folder, *, kind="ldznet", size_px=64):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    if kind == "znet":
        return ZNet.from_ldm(unet)
    return LDZNet.from_ldm(unet, size_px=size_px)


def head_to_compvis(head):
    weights = {}
    for name, tensor in head.state_dict().items():
        if name.startswith("unet."):
            name = unet_to_compvis(name.removeprefix("unet."))
        elif name.startswith("pools."):
            _, number, inner = name.split(".", 2)
            name = f"{_BLOCKS[int(number)]}.attentionpool2D.{inner}"
        weights[name] = tensor
    return weights


def to_ldznet(folder, head, *, frozen=True, ema=True):
    """The state_dict of an LD-ZNet checkpoint over a diffusers folder."""
    weights = with_ema(head_to_compvis(head), ema=ema)
    state = {**schedule_buffers(), **weights, **read_rest(folder)}
    if frozen:
        state |= with_ema(read_unet(folder), FROZEN, ema=ema, raw=True)
        state |= {FROZEN + name: tensor for name, tensor in schedule_buffers().items()}
    return state


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
