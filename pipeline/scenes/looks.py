"""Looks: drawing styles of scenes, from palette to noise.

A look changes no layout, phrase or mask: scene (seed, split, index) holds the same objects in the
same places in every look, so that a corpus in another look differs by its drawing alone. Random
numbers of a look itself come from a stream of their own.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """A drawing style; the defaults are the standard one.

    Lengths are fractions of the image's side, colours 0-255.
    """

    name: str
    palette: Mapping[str, Rgb] = field(default_factory=dict)  # in place of the standard colours
    rim: float = 0.010  # width of the outline
    rim_shade: float = 0.38  # the outline's colour over the object's; 1: no outline to be seen
    shading: float = 0.13  # how much brighter the top of an object is, over its colour
    shadow: float = 0.38  # how dark a drop shadow is
    wave: float = 0.0  # textures bend so far sideways, in periods
    accent: float = 1.0  # contrast of the texture's second colour
    background: str = "standard"  # standard, flat, paper, dark or woven
    contrast: float = 1.0  # about mid grey, of the whole image
    blur: float = 0.0  # standard deviation of a Gaussian
    grain: float = 0.0  # standard deviation of noise that is equal in red, green and blue
    speckle: float = 0.0  # standard deviation of noise drawn for each colour


STANDARD = Look("standard")
_ALL = (
    STANDARD,
    Look("flat", rim_shade=1.0, shading=0.0, shadow=0.0, background="flat", accent=0.8),
    Look("ink", rim=0.022, rim_shade=0.08, shading=0.0, shadow=0.0, background="paper"),
    Look("night", rim_shade=0.6, shadow=0.2, background="dark", contrast=0.85, grain=4.0),
    Look("film", contrast=0.75, blur=0.006, grain=8.0, speckle=5.0),
    Look(
        "pastel",
        palette={
            "red": (226, 84, 88),
            "orange": (244, 158, 84),
            "yellow": (246, 226, 110),
            "green": (106, 186, 118),
            "blue": (92, 138, 222),
            "purple": (156, 104, 190),
            "pink": (246, 176, 208),
            "white": (250, 250, 248),
        },
        rim_shade=0.75,
        shading=0.25,
        shadow=0.15,
        accent=0.9,
        blur=0.004,
    ),
    # The tiny latent diffusion model is trained on all but this last one: it shows what a change of
    # drawing style costs a model that has never seen it.
    Look(
        "woven",
        palette={
            "red": (190, 44, 66),
            "orange": (228, 112, 44),
            "yellow": (230, 196, 70),
            "green": (74, 140, 84),
            "blue": (58, 84, 180),
            "purple": (112, 68, 146),
            "pink": (232, 142, 170),
            "white": (232, 228, 214),
        },
        rim=0.016,
        rim_shade=1.5,
        shading=-0.12,
        wave=0.35,
        background="woven",
        speckle=9.0,
    ),
)
LOOKS = MappingProxyType({look.name: look for look in _ALL})


def restyle_background(
    standard_HWC: NDArray[np.float32], look: Look, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A look's background from the standard one: both (H, W, 3) float32 in 0-255."""
    mean = standard_HWC.mean(axis=(0, 1))
    if look.background == "flat":
        return np.broadcast_to(mean, standard_HWC.shape).astype(np.float32)
    if look.background == "paper":
        tone = np.float32(rng.uniform(200.0, 240.0))
        return (tone + 0.12 * (standard_HWC - mean)).astype(np.float32)
    if look.background == "dark":
        return (standard_HWC * rng.uniform(0.15, 0.4)).astype(np.float32)
    if look.background == "woven":
        side = standard_HWC.shape[0]
        phase = 2.0 * np.pi * rng.uniform(14.0, 22.0) * np.arange(side) / side
        threads = np.sin(phase)[:, None] * np.sin(phase)[None, :]
        return (0.6 * mean + 0.4 * standard_HWC + 22.0 * threads[..., None]).astype(np.float32)
    return standard_HWC


def finish_image(
    canvas_HWC: NDArray[np.float32], look: Look, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Apply a look's contrast, blur and noise to an image (H, W, 3) float32 in 0-255."""
    canvas = canvas_HWC
    side = canvas.shape[0]
    if look.contrast != 1.0:
        canvas = 128.0 + np.float32(look.contrast) * (canvas - 128.0)
    if look.blur:
        smooth = ImageFilter.GaussianBlur(look.blur * side)
        image = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
        canvas = np.asarray(image.filter(smooth), np.float32)
    for strength, depth in ((look.grain, 1), (look.speckle, 3)):
        if strength:
            noise = rng.standard_normal((side, side, depth), dtype=np.float32)
            canvas = canvas + noise * np.float32(strength)
    return canvas


def open_look_stream(look: Look, *, seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of a look in one scene, independent of those of the scene's layout."""
    key = [seed, zlib.crc32(split.encode()), index, zlib.crc32(look.name.encode())]
    return np.random.Generator(np.random.PCG64(key))
