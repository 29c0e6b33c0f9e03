"""Pictures that move like video, computed and never downloaded: textures, objects, motions, cameras, cuts.

Properties that hold:
- A scene is a pure function of its generator and its motion kind, a frame a pure function of (scene, time). Any frame
  rate, even an uneven one, therefore samples the same movement.
- Lengths are in short sides of the picture, times in seconds, angles in radians, so a picture can have any size.
- Colours stay well inside the gamut (no channel near 0 or 255), so that 4:2:0 and limited range change them little.
- A part of a video predicts the rest: paths are smooth, objects firm, and large structures stronger than fine ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOTIONS = ("linear", "bounce", "orbit", "sway", "fall", "spin", "zoom", "pan")
SUPERSAMPLING = 2  # textures are drawn this much finer than the picture, so that moving edges stay smooth
WORLD_MARGIN = 0.45  # how far a camera may leave the centre, in short sides

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Pose:
    """Where something is: centre in short sides from the middle of the picture, turn, and relative size."""

    x: float
    y: float
    angle: float = 0.0
    scale: float = 1.0


PosePath = Callable[[float], Pose]


@dataclass(frozen=True)
class Sprite:
    """A textured object: `image` is RGBA with a margin that has colour but no opacity; `half` its half side."""

    image: Image.Image
    half: float
    path: PosePath


@dataclass(frozen=True)
class Shot:
    """The part of a video between two cuts: a world seen by a camera, and objects from far to near."""

    start: float
    world: Image.Image
    camera: PosePath
    sprites: tuple[Sprite, ...]


# --- textures --------------------------------------------------------------------------------------------------


def value_noise(rng: np.random.Generator, height: int, width: int, cell: int, octaves: int = 4) -> F32:
    """Multi-octave value noise in 0…1, float32 [height, width]; `cell` is the coarsest cell in pixels."""
    total = np.zeros((height, width), np.float32)
    weight = 1.0
    for _ in range(octaves):
        grid = rng.random((math.ceil(height / cell) + 2, math.ceil(width / cell) + 2), dtype=np.float32)
        smooth = Image.fromarray(grid, mode=None).resize(
            (grid.shape[1] * cell, grid.shape[0] * cell), Image.Resampling.BICUBIC
        )
        total += weight * np.asarray(smooth)[cell // 2 : cell // 2 + height, cell // 2 : cell // 2 + width]
        weight *= 0.42
        cell = max(2, cell // 2)
    low, high = np.percentile(total, (1, 99))
    return np.clip((total - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def _pattern(rng: np.random.Generator, height: int, width: int, unit: int) -> F32:
    """One scalar field in 0…1: clouds, stripes, checks, rings or wood, softened and stirred by noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / unit
    turn = rng.uniform(0, math.pi)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    clouds = value_noise(rng, height, width, cell=max(4, unit))
    kind = rng.choice(["clouds", "clouds", "stripes", "checks", "wood", "rings"])
    if kind == "clouds":
        return clouds
    if kind == "stripes":
        field = np.tanh(2.5 * np.sin(2 * math.pi * u / 0.9))
    elif kind == "checks":
        field = np.tanh(4 * np.sin(math.pi * u / 0.7) * np.sin(math.pi * v / 0.7))
    elif kind == "wood":
        field = np.sin(2 * math.pi * (u + 0.7 * clouds))
    else:
        field = np.sin(2 * math.pi * np.hypot(x - x.mean(), y - y.mean()) / 0.8 + 2 * clouds)
    return np.clip(0.5 + 0.36 * field + 0.3 * (clouds - 0.5), 0, 1)


def _hsv(hue: float, saturation: float, value: float) -> F32:
    """RGB in 0…1, float32 [3]."""
    k = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


def _palette(rng: np.random.Generator, hue: float, *, bright: float, vivid: float, contrast: float) -> F32:
    """Three RGB colours, dark to light, of related hues; float32 [3, 3]."""
    hues = (hue + rng.uniform(-0.07, 0.07, 3)) % 1
    values = bright + contrast * np.array([-1.0, 0.0, 1.0])
    return np.stack([_hsv(h, vivid * s, v) for h, s, v in zip(hues, (1.0, 0.85, 0.6), values, strict=True)])


def _colour(field: F32, palette_33: F32) -> F32:
    """Field 0…1 [H, W] → RGB 0…1 [H, W, 3] along the palette, kept inside the gamut."""
    stops = np.array([0.0, 0.5, 1.0])
    rgb = np.stack([np.interp(field, stops, palette_33[:, c]) for c in range(3)], axis=-1)
    return np.clip(rgb, 0.07, 0.93).astype(np.float32)


def _to_u8(rgb: F32) -> U8:
    return (rgb * 255 + 0.5).astype(np.uint8)


# --- paths -----------------------------------------------------------------------------------------------------


def _fold(value: float, low: float, high: float) -> float:
    """A line reflected at both walls."""
    span = high - low
    phase = (value - low) % (2 * span)
    return low + (phase if phase <= span else 2 * span - phase)


def _wrap(value: float, limit: float) -> float:
    """A line that leaves at one side and comes back at the other."""
    return (value + limit) % (2 * limit) - limit


def object_path(kind: str, rng: np.random.Generator, half: float, reach_x: float, reach_y: float) -> PosePath:
    """A path of one object of half side `half` in a picture that reaches ±reach_x by ±reach_y."""
    x0, y0 = float(rng.uniform(-0.8, 0.8) * reach_x), float(rng.uniform(-0.7, 0.7) * reach_y)
    heading = float(rng.uniform(0, 2 * math.pi))
    speed = float(rng.uniform(0.22, 0.5))
    vx, vy = speed * math.cos(heading), speed * math.sin(heading)
    turn = float(rng.choice([-1, 1]) * rng.uniform(0.2, 0.7))
    rate = float(rng.uniform(1.2, 2.6))
    if kind == "linear":
        return lambda t: Pose(_wrap(x0 + vx * t, reach_x + half), _wrap(y0 + vy * t, reach_y + half), turn * t)
    if kind == "bounce":
        wide, high = max(reach_x - half, 0.05), max(reach_y - half, 0.05)
        return lambda t: Pose(_fold(x0 + 1.4 * vx * t, -wide, wide), _fold(y0 + 1.4 * vy * t, -high, high), turn * t)
    if kind == "orbit":
        rx, ry = float(rng.uniform(0.18, 0.38)), float(rng.uniform(0.15, 0.33))
        spin = rate * (1 if turn > 0 else -1)
        return lambda t: Pose(
            0.4 * x0 + rx * math.cos(spin * t + heading),
            0.4 * y0 + ry * math.sin(spin * t + heading),
            turn * t,
        )
    if kind == "sway":
        ax, ay = float(rng.uniform(0.15, 0.4)), float(rng.uniform(0.0, 0.2))
        return lambda t: Pose(
            0.6 * x0 + ax * math.sin(rate * t + heading),
            y0 + ay * math.sin(2 * rate * t),
            0.5 * math.sin(rate * t),
        )
    if kind == "fall":
        floor, drop = reach_y - half, float(rng.uniform(0.55, 0.9)) * reach_y
        period = 2 * math.sqrt(2 * drop / 1.3)  # thrown up at the floor, under a gravity of 1.3 short sides / s²
        phase = float(rng.uniform(0, period))

        def fall(t: float) -> Pose:
            s = (t + phase) % period
            return Pose(_wrap(x0 + 0.8 * vx * t, reach_x + half), floor - 1.3 * s * (period - s) / 2, 2 * turn * t)

        return fall
    if kind == "spin":
        return lambda t: Pose(0.8 * x0 + 0.1 * math.sin(t), 0.8 * y0 + 0.1 * math.cos(t), 3.2 * turn * t + heading)
    if kind == "zoom":
        return lambda t: Pose(0.7 * x0, 0.7 * y0, 0.4 * turn * t, 1.0 + 0.45 * math.sin(rate * t + heading))
    if kind == "pan":
        return lambda t: Pose(x0 + 0.35 * vx * t, y0 + 0.35 * vy * t, 0.3 * turn * t)
    raise ValueError(f"motion kind {kind!r}: one of {', '.join(MOTIONS)}")


def camera_path(kind: str, rng: np.random.Generator) -> PosePath:
    """The camera of a shot: it pans, zooms and rolls in `pan`, drifts a little elsewhere or stands still."""
    phase, rate = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.5, 0.9))
    if kind == "pan":
        reach, zoom = WORLD_MARGIN - 0.12, float(rng.choice([0.0, 0.18]))
        return lambda t: Pose(
            reach * math.sin(rate * t + phase),
            0.6 * reach * math.sin(0.7 * rate * t),
            0.05 * math.sin(t),
            1.0 + zoom * math.sin(0.9 * t + phase),
        )
    drift = float(rng.choice([0.0, 0.0, 0.06, 0.12]))
    return lambda t: Pose(drift * math.sin(rate * t + phase), 0.5 * drift * math.cos(rate * t))


# --- scenes ----------------------------------------------------------------------------------------------------


def _sprite_alpha(rng: np.random.Generator, side: int) -> F32:
    """Opacity of a disc, a rounded box or a blob in a square, soft at the edge; float32 [side, side]."""
    y, x = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) / side * 2.3 - 1.15  # leaves a margin around ±1
    shape = rng.choice(["disc", "box", "blob"])
    if shape == "disc":
        distance = np.hypot(x, y) - 0.97
    elif shape == "box":
        ratio = float(rng.uniform(0.55, 0.95))
        distance = np.hypot(np.maximum(np.abs(x) - 0.75, 0), np.maximum(np.abs(y) - 0.75 * ratio, 0)) - 0.18
    else:
        theta = np.arctan2(y, x)
        waves = sum(float(rng.uniform(0.04, 0.13)) * np.sin(k * theta + float(rng.uniform(0, 6.3))) for k in (2, 3, 5))
        distance = np.hypot(x, y) - (0.78 + waves)
    return np.clip(0.5 - distance * side / 5, 0, 1).astype(np.float32)


def _sprite(rng: np.random.Generator, kind: str, hue: float, pixels: int, reach_x: float, reach_y: float) -> Sprite:
    half = float(rng.uniform(0.17, 0.28))
    side = max(16, round(2 * half * 1.15 * pixels * SUPERSAMPLING))
    palette = _palette(rng, hue, bright=float(rng.uniform(0.5, 0.72)), vivid=0.7, contrast=0.24)
    rgb = _colour(_pattern(rng, side, side, max(4, side // 2)), palette)
    y, x = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) / side * 2 - 1
    rgb *= (1.08 - 0.3 * np.clip(x * 0.5 + y * 0.7, -0.4, 1))[..., None]  # lit from the upper left
    alpha = _sprite_alpha(rng, side)
    rgba = np.concatenate([_to_u8(np.clip(rgb, 0.05, 0.95)), _to_u8(alpha)[..., None]], axis=-1)
    return Sprite(Image.fromarray(rgba), half * 1.15, object_path(kind, rng, half, reach_x, reach_y))


def _world(rng: np.random.Generator, hue: float, width: int, height: int) -> Image.Image:
    """The background: larger than the picture by the camera's margin on every side."""
    short = min(width, height)
    w, h = (round((side + 2 * WORLD_MARGIN * short) * 1.25) for side in (width, height))
    palette = _palette(rng, hue, bright=float(rng.uniform(0.36, 0.6)), vivid=0.34, contrast=0.15)
    rgb = _colour(_pattern(rng, h, w, round(short * float(rng.uniform(0.3, 0.6)))), palette)
    rgb *= (0.85 + 0.3 * value_noise(rng, h, w, cell=short, octaves=2))[..., None]  # uneven light
    return Image.fromarray(_to_u8(np.clip(rgb, 0.06, 0.94)))


def make_scene(
    kind: str, rng: np.random.Generator, *, width: int, height: int, seconds: float, cuts: int = 0
) -> list[Shot]:
    """The shots of one video, in order; `cuts` hard cuts at uneven times."""
    edges = np.sort(rng.uniform(0.25, 0.75, cuts)) * seconds
    short = min(width, height)
    reach_x, reach_y = width / short / 2, height / short / 2
    shots = []
    for start in [0.0, *edges.tolist()]:
        hue = float(rng.random())
        world = _world(rng, hue, width, height)
        # opposite hues, so that objects stand out of the background
        hues = (hue + 0.5 + rng.uniform(-0.22, 0.22, int(rng.integers(2, 4)))) % 1
        sprites = tuple(_sprite(rng, kind, float(h), short, reach_x, reach_y) for h in hues)
        shots.append(Shot(float(start), world, camera_path(kind, rng), sprites))
    return shots


def _view(world: Image.Image, camera: Pose, width: int, height: int) -> Image.Image:
    short = min(width, height)
    c, s = math.cos(camera.angle) / camera.scale, math.sin(camera.angle) / camera.scale
    cx, cy = world.width / 2 + camera.x * short, world.height / 2 + camera.y * short
    matrix = (c, -s, cx - c * width / 2 + s * height / 2, s, c, cy - s * width / 2 - c * height / 2)
    return world.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _place(frame: Image.Image, sprite: Sprite, pose: Pose, camera: Pose) -> None:
    """Paste the sprite where the camera sees it, over a soft shadow."""
    width, height = frame.size
    short = min(width, height)
    # objects move against the camera like the background does
    dx, dy = (pose.x - camera.x) * camera.scale, (pose.y - camera.y) * camera.scale
    x, y = width / 2 + dx * short, height / 2 + dy * short
    scale = pose.scale * camera.scale
    reach = math.ceil(sprite.half * scale * short * math.sqrt(2)) + 1
    left, top = math.floor(x) - reach, math.floor(y) - reach
    if left >= width or top >= height or left + 2 * reach <= 0 or top + 2 * reach <= 0:
        return
    zoom = sprite.image.width / (2 * sprite.half * short * scale)
    c, s = math.cos(pose.angle) * zoom, math.sin(pose.angle) * zoom
    px, py, middle = x - left, y - top, sprite.image.width / 2
    matrix = (c, s, middle - c * px - s * py, -s, c, middle + s * px - c * py)
    patch = sprite.image.transform((2 * reach, 2 * reach), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    alpha = patch.getchannel("A")
    offset = round(0.018 * short)
    frame.paste((28, 28, 32), (left + offset, top + offset), alpha.point(lambda a: a * 0.35))
    frame.paste(patch.convert("RGB"), (left, top), alpha)


def render(shots: Sequence[Shot], t: float, *, width: int, height: int) -> U8:
    """The picture at `t` seconds: RGB uint8 [height, width, 3]."""
    shot = [s for s in shots if s.start <= t][-1]
    camera = shot.camera(t)
    frame = _view(shot.world, camera, width, height)
    for sprite in shot.sprites:
        _place(frame, sprite, sprite.path(t), camera)
    return np.asarray(frame)
