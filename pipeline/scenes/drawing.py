"""Drawing one scene of the demo corpus: objects, textures, backgrounds.

Lengths and places are fractions of the image's side, so that a scene looks the same at any size;
``size_px`` enters only where pixels are made. Objects are rasterised at three samples a pixel each
way and averaged down, a patch at a time, then composited bottom to top.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pipeline.scenes.looks import STANDARD, Look

FloatArray = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
COLOURS = {
    "red": (212, 34, 40),
    "orange": (246, 126, 18),
    "yellow": (250, 216, 42),
    "green": (50, 156, 66),
    "blue": (34, 92, 206),
    "purple": (122, 54, 168),
    "pink": (248, 150, 192),
    "white": (244, 244, 240),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
# Radii as fractions of the side. The gap between the two ranges, a factor of 1.6, keeps the words
# unambiguous with no second object to compare with.
RADII = {"small": (0.095, 0.125), "large": (0.200, 0.255)}

_SAMPLES = 3  # samples a pixel each way
_SHADOW_REACH = 0.05  # offset of the drop shadow and three times its blur, rounded up
_INTERIOR, _OUTLINE = 255, 128  # values in the label image of a rasterised shape


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: the four attributes phrases speak of, and where and how it is drawn.

    ``x``, ``y`` (right and down from the top left corner) and ``radius`` are fractions of the
    image's side. ``turn_rad`` turns the outline and ``grain_rad`` the texture; ``period`` is the
    texture's repeat as a fraction of the side; ``tint`` is added to the RGB colour (0-255).
    """

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    turn_rad: float = 0.0
    grain_rad: float = 0.0
    period: float = 0.065
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Patch:
    """A drawn object before it is put on the canvas.

    ``top`` and ``left`` are the patch's corner in canvas pixels and may be negative. ``rgb``
    (h, w, 3) is the colour in 0-255 times the coverage; ``coverage`` and ``shadow`` (h, w) are
    in 0-1. All float32.
    """

    top: int
    left: int
    rgb: FloatArray
    coverage: FloatArray
    shadow: FloatArray


def draw_object(scene_object: SceneObject, *, size_px: int, look: Look = STANDARD) -> Patch:
    """Draw one object, with its outline, texture, shading and shadow, for a canvas of size_px."""
    reach_px = (scene_object.radius * 1.3 + _SHADOW_REACH) * size_px
    left = math.floor(scene_object.x * size_px - reach_px)
    top = math.floor(scene_object.y * size_px - reach_px)
    side_px = math.ceil(2 * reach_px) + 1
    centre = (
        (scene_object.x * size_px - left) * _SAMPLES,
        (scene_object.y * size_px - top) * _SAMPLES,
    )
    side, unit = side_px * _SAMPLES, size_px * _SAMPLES
    label = _rasterise(scene_object, side, centre, unit, look.rim)
    marked = _texture_pattern(scene_object, side, centre, unit, look.wave)
    interior = label == _INTERIOR
    rim = _average_down(label == _OUTLINE)
    accent = _average_down(interior & marked)
    body = _average_down(interior) - accent
    base_rgb, accent_rgb, rim_rgb = _object_colours(scene_object, look)
    # Light falls from above: the top of an object is a little brighter than its bottom.
    rows = np.arange(side_px, dtype=np.float32) - centre[1] / _SAMPLES
    light = (1.0 - look.shading * rows / (scene_object.radius * size_px))[:, None, None]
    rgb = (body[..., None] * base_rgb + accent[..., None] * accent_rgb) * light
    rgb += rim[..., None] * rim_rgb
    coverage = body + accent + rim
    shadow = _cast_shadow(coverage, size_px)
    return Patch(top, left, np.minimum(rgb, 255.0 * coverage[..., None]), coverage, shadow)


def paste_patch(
    canvas: FloatArray,
    owner: NDArray[np.int8],
    patch: Patch,
    *,
    number: int,
    shadow: float = STANDARD.shadow,
) -> None:
    """Put a patch on the canvas, in place, above what is there.

    ``canvas`` is (H, W, 3) float32 in 0-255. ``owner`` (H, W) says which object shows at a pixel;
    pixels at least half covered by the patch become ``number``. ``shadow`` is how dark its drop
    shadow is.
    """
    height, width = owner.shape
    rows = slice(max(patch.top, 0), min(patch.top + patch.coverage.shape[0], height))
    cols = slice(max(patch.left, 0), min(patch.left + patch.coverage.shape[1], width))
    inside = (
        slice(rows.start - patch.top, rows.stop - patch.top),
        slice(cols.start - patch.left, cols.stop - patch.left),
    )
    coverage = patch.coverage[inside]
    canvas[rows, cols] *= (1.0 - shadow * patch.shadow[inside])[..., None]
    canvas[rows, cols] *= (1.0 - coverage)[..., None]
    canvas[rows, cols] += patch.rgb[inside]
    owner[rows, cols][coverage >= 0.5] = number


def draw_background(rng: np.random.Generator, *, size_px: int) -> FloatArray:
    """A background (size_px, size_px, 3) float32 in 0-255: gradient, noise, blobs or stripes.

    Its colours are drawn independently of the objects, less saturated than theirs.
    """
    first, second = _muted_colour(rng), _muted_colour(rng)
    kind = int(rng.integers(4))
    if kind == 0:
        amount = _ramp(rng, size_px)
    elif kind == 1:
        amount = 0.65 * _smooth_noise(rng, size_px, int(rng.integers(3, 6)))
        amount += 0.35 * _smooth_noise(rng, size_px, int(rng.integers(9, 20)))
    elif kind == 2:
        amount = np.clip(3.0 * _smooth_noise(rng, size_px, int(rng.integers(4, 8))) - 1.0, 0.0, 1.0)
    else:
        num_stripes = rng.uniform(3.0, 9.0)
        wave = np.sin(2.0 * np.pi * num_stripes * _ramp(rng, size_px))
        amount = np.clip(0.5 + 2.0 * wave, 0.0, 1.0)
        second = first + (second - first) * np.float32(0.45)
    return (first + amount[..., None] * (second - first)).astype(np.float32)


def _rasterise(
    scene_object: SceneObject, side: int, centre: tuple[float, float], unit: int, rim_width: float
) -> NDArray[np.uint8]:
    """The outline's label image (side, side): interior, outline, and zero outside."""
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    radius, rim = scene_object.radius * unit, max(round(rim_width * unit), 1)
    if scene_object.shape in ("circle", "ring"):
        draw.ellipse(_box(centre, radius), fill=_INTERIOR, outline=_OUTLINE, width=rim)
        if scene_object.shape == "ring":
            draw.ellipse(_box(centre, radius * 0.5 + rim), fill=_OUTLINE)
            draw.ellipse(_box(centre, radius * 0.5), fill=0)
    else:
        corners = _corners(scene_object.shape) * radius
        cos, sin = math.cos(scene_object.turn_rad), math.sin(scene_object.turn_rad)
        turned = corners @ np.array([[cos, sin], [-sin, cos]]) + np.array(centre)
        points = [(float(x), float(y)) for x, y in turned]
        draw.polygon(points, fill=_INTERIOR, outline=_OUTLINE, width=rim)
    return np.asarray(image)


def _box(centre: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)


def _corners(shape: str) -> NDArray[np.float64]:
    """The polygon (n, 2) of a shape for radius 1, y down, scaled so that areas look alike."""
    if shape == "square":
        return 0.88 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64)
    if shape == "triangle":
        angle = np.radians([-90.0, 30.0, 150.0])
        return 1.24 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "star":
        angle = np.radians(np.arange(10) * 36.0 - 90.0)
        reach = np.where(np.arange(10) % 2 == 0, 1.24, 0.56)
        return reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "cross":
        quarter = np.array([[0.36, -1.06], [0.36, -0.36], [1.06, -0.36]])
        steps = [quarter]
        for _ in range(3):
            steps.append(np.stack([-steps[-1][:, 1], steps[-1][:, 0]], axis=1))
        return np.concatenate(steps)
    if shape == "heart":  # the usual parametric heart, 32 units wide, centred on its area
        angle = np.linspace(0.0, 2.0 * np.pi, 40, endpoint=False)
        x = 16.0 * np.sin(angle) ** 3
        y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
        return np.stack([x, -y - 1.0], axis=1) * (1.08 / 16.0)
    raise ValueError(f"the shape of a polygon must be one of {SHAPES}, but got {shape!r}")


def _texture_pattern(
    scene_object: SceneObject, side: int, centre: tuple[float, float], unit: int, wave: float
) -> NDArray[np.bool_]:
    """Where (side, side) the texture shows its second colour."""
    if scene_object.texture == "plain":
        return np.zeros((side, side), dtype=np.bool_)
    period = scene_object.period * unit
    x = (np.arange(side, dtype=np.float32) - centre[0])[None, :] / period
    y = (np.arange(side, dtype=np.float32) - centre[1])[:, None] / period
    cos, sin = math.cos(scene_object.grain_rad), math.sin(scene_object.grain_rad)
    u, v = cos * x + sin * y, cos * y - sin * x
    if wave:
        u, v = u + wave * np.sin(1.5 * v), v + wave * np.sin(1.5 * u)
    if scene_object.texture == "striped":
        return u - np.floor(u) < 0.5
    if scene_object.texture == "checkered":
        return (np.floor(1.6 * u) + np.floor(1.6 * v)) % 2 == 0
    if scene_object.texture == "dotted":
        return (u - np.floor(u) - 0.5) ** 2 + (v - np.floor(v) - 0.5) ** 2 < 0.31**2
    raise ValueError(f"a texture must be one of {TEXTURES}, but got {scene_object.texture!r}")


def _object_colours(
    scene_object: SceneObject, look: Look
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Colour, the texture's second colour and the outline's, each (3,) in 0-255."""
    colour = look.palette.get(scene_object.colour, COLOURS[scene_object.colour])
    base = np.array(colour, dtype=np.float32)
    base = np.clip(base + np.array(scene_object.tint, dtype=np.float32), 0.0, 255.0)
    # A shade of the same hue. Where red is strong it is a darker one: light red would be pink.
    darker = base[0] > 160.0
    accent = base * np.float32(0.52) if darker else base + (255.0 - base) * np.float32(0.62)
    accent = accent if look.accent == 1.0 else base + (accent - base) * np.float32(look.accent)
    return base, accent, np.minimum(base * np.float32(look.rim_shade), 255.0)


def _average_down(samples: NDArray[np.bool_]) -> FloatArray:
    image = Image.fromarray(samples.astype(np.uint8) * np.uint8(255))
    return np.asarray(image.reduce(_SAMPLES), dtype=np.float32) / np.float32(255.0)


def _cast_shadow(coverage: FloatArray, size_px: int) -> FloatArray:
    image = Image.fromarray((np.minimum(coverage, 1.0) * 255.0).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(0.010 * size_px))
    shift_px = max(round(0.014 * size_px), 1)
    return np.roll(np.asarray(blurred, np.float32), (shift_px, shift_px), (0, 1)) / np.float32(255)


def _muted_colour(rng: np.random.Generator) -> FloatArray:
    """A random RGB colour (3,) in 0-255 of saturation at most 0.45."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.05, 0.45), rng.uniform(70, 225)
    wheel = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    return (value * (1.0 - saturation * (1.0 - wheel))).astype(np.float32)


def _ramp(rng: np.random.Generator, size_px: int) -> FloatArray:
    """A linear ramp (size_px, size_px) in 0-1 along a random direction."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    axis = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px - 0.5
    ramp = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    return (ramp / (abs(math.cos(angle)) + abs(math.sin(angle))) + 0.5).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size_px: int, num_cells: int) -> FloatArray:
    """Smooth random values (size_px, size_px), about 0-1, num_cells of them a side."""
    cells = Image.fromarray(rng.random((num_cells, num_cells), dtype=np.float32))
    return np.asarray(cells.resize((size_px, size_px), Image.Resampling.BICUBIC), np.float32)
