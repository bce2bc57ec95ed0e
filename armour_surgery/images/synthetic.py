"""Images drawn on the fly, for calibrating a model when there are no photos.

Vision Transformers answer to edges, occlusion, shading and texture much as they do on photos when an image has the
statistics of one. Two old models of natural images have them: "dead leaves" (shapes of power-law sizes that
cover each other) and noise with a 1/f spectrum.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from armour_surgery.errors import CalibrationError

__all__ = ["synthetic_images"]

Array = NDArray[np.float32]

MAX_LEAVES = 240
TEXTURES = 3


def synthetic_images(
    count: int, size: tuple[int, int, int] = (3, 224, 224), seed: int = 0, start: int = 0
) -> Iterator[torch.Tensor]:
    """`count` float32 images `[C, H, W]` with values in [0, 1], drawn one at a time.

    Image i depends on `seed`, `start + i` and `size` alone, so that the stream can be taken up anywhere. No global
    random numbers are used. `size` is (C, H, W) in pixels, with any number of channels.

    Raises:
        CalibrationError: count, start or seed is negative, or a size is below 1.
    """
    if count < 0 or start < 0 or seed < 0:
        raise CalibrationError(
            f"synthetic images need count, start and seed of 0 or more, not {count}, {start} and {seed}"
        )
    if len(size) != 3 or min(size) < 1:
        raise CalibrationError(f"synthetic images of size {size!r}: pass (channels, height, width), each 1 or more")
    return (torch.from_numpy(_draw((seed, index, *size), size)) for index in range(start, start + count))


def _draw(entropy: tuple[int, ...], size: tuple[int, int, int]) -> Array:
    rng = np.random.default_rng(entropy)
    channels, height, width = size
    # Gray to white noise: small exponents give grain, large ones clouds and shading.
    shading = _noise(rng, 1, height, width, rng.uniform(1.2, 2.2))
    if rng.random() < 0.1:
        image = _clouds(rng, size)
    else:
        leaf, leaves = _dead_leaves(rng, height, width)
        colors = _colors(rng, leaves, channels)
        image = colors.take(leaf, axis=1) + _leaf_texture(rng, leaf, leaves)
        for _ in range(rng.choice(5, p=(0.2, 0.35, 0.25, 0.1, 0.1))):
            image = _soften(image)
        grain = _noise(rng, channels, height, width, rng.uniform(0.5, 1.3))
        image += np.float32(0.01 + 0.06 * rng.random() ** 2) * grain
    image += np.float32(rng.uniform(0.02, 0.18)) * shading
    return np.clip(image, 0, 1, out=image)


def _noise(rng: np.random.Generator, channels: int, height: int, width: int, exponent: float) -> Array:
    """Noise `[channels, height, width]` of mean 0 and deviation 1 whose amplitudes fall as frequency**-exponent."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(fy, fx).astype(np.float32)
    frequency[0, 0] = np.inf
    parts = rng.standard_normal((channels, *frequency.shape, 2), dtype=np.float32)
    spectrum = parts.view(np.complex64)[..., 0] * frequency ** np.float32(-exponent)
    field = np.fft.irfft2(spectrum, (height, width)).astype(np.float32)
    scale: Array = field.std(axis=(1, 2), keepdims=True) + np.float32(1e-9)
    return field / scale


def _clouds(rng: np.random.Generator, size: tuple[int, int, int]) -> Array:
    image = _noise(rng, *size, rng.uniform(0.8, 1.8)) * np.float32(rng.uniform(0.05, 0.2))
    return image + _colors(rng, 1, size[0])[:, :, None]


def _dead_leaves(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.int32], int]:
    """For every pixel the number of the leaf on top there, and how many leaves there are."""
    extent = math.sqrt(height * width)
    smallest, largest = extent * rng.uniform(0.015, 0.06), extent * rng.uniform(0.2, 0.6)
    power = rng.uniform(0.5, 2.0)
    # Radii have the density r**-(power + 1) between the two: with 2, leaves of each scale cover as much.
    low, high = largest**-power, smallest**-power
    radii = rng.uniform(low, high, MAX_LEAVES) ** (-1 / power)
    # Enough leaves to cover the image this many times over: few leave the background, more hide each other.
    cover = rng.uniform(0.5, 3.5) * height * width
    leaves = int(np.searchsorted(np.cumsum(2.2 * radii**2), cover)) + 2
    canvas = Image.new("I", (width, height), 0)
    draw = ImageDraw.Draw(canvas)
    centers = rng.uniform(-0.1, 1.1, (MAX_LEAVES, 2)) * (width, height)
    for number in range(1, min(leaves, MAX_LEAVES)):
        draw.polygon(_outline(rng, centers[number], radii[number]), fill=number)
    return np.asarray(canvas, dtype=np.int32), min(leaves, MAX_LEAVES)


def _outline(rng: np.random.Generator, center: NDArray[np.float64], radius: float) -> list[float]:
    """A disc, box, triangle or polygon as x, y, x, y and so on, turned and stretched."""
    kind = rng.integers(5)
    turn = rng.uniform(0, 2 * math.pi)
    if kind < 2:
        angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    elif kind == 2:
        half = rng.uniform(0.3, 1.27)
        angles = np.array((half, math.pi - half, math.pi + half, -half))
    else:
        angles = np.sort(rng.uniform(0, 2 * math.pi, 3 if kind == 3 else rng.integers(4, 9)))
    squeeze = rng.uniform(0.4, 1) if kind < 2 else 1.0
    x, y = np.cos(angles), squeeze * np.sin(angles)
    cosine, sine = math.cos(turn), math.sin(turn)
    turned = np.stack((cosine * x - sine * y, sine * x + cosine * y), axis=1)
    outline: list[float] = (center + radius * turned).ravel().tolist()
    return outline


def _colors(rng: np.random.Generator, leaves: int, channels: int) -> Array:
    """A color for each leaf, `[channels, leaves]`: shades of a few, from gray over natural tones to garish."""
    tones = int(rng.integers(3, 9))
    saturation = rng.choice((0.0, 0.06, 0.12, 0.3), p=(0.1, 0.35, 0.35, 0.2))
    # Photos vary from warm to cool (along the channels) more than from green to magenta.
    warm = np.linspace(1, -1, channels) if channels > 1 else np.zeros(1)
    light = rng.uniform(0.05, 0.95, (1, tones)) ** rng.uniform(0.7, 1.5)
    cast = rng.normal(0, 0.5) * saturation
    hues = saturation * (rng.normal(0, 1, (channels, tones)) + warm[:, None] * rng.normal(0, 1.5, tones))
    palette = light + hues + cast * warm[:, None]
    shades = rng.normal(0, 0.05, (1, leaves)) + rng.normal(0, 0.01, (channels, leaves))
    colors = palette[:, rng.integers(tones, size=leaves)] + shades
    clipped: Array = np.clip(colors, 0.02, 0.98).astype(np.float32)
    return clipped


def _leaf_texture(rng: np.random.Generator, leaf: NDArray[np.int32], leaves: int) -> Array:
    """Brightness to add, `[1, H, W]`: every leaf is smooth or has its own contrast of one of a few textures."""
    if rng.random() < 0.3:
        return np.zeros((1, 1, 1), dtype=np.float32)
    height, width = leaf.shape
    which = rng.integers(TEXTURES, size=leaves)
    contrast = np.where(rng.random(leaves) < 0.35, 0, rng.uniform(0.02, 0.15, leaves)).astype(np.float32)
    textures = np.concatenate([_noise(rng, 1, height, width, rng.uniform(0.5, 1.6)) for _ in range(TEXTURES)])
    picked = np.take_along_axis(textures, which.take(leaf)[None], axis=0)
    return picked * contrast.take(leaf)


def _soften(image: Array) -> Array:
    """The image after a filter of (1, 2, 1) / 4 along both axes; edges are repeated."""
    for axis in (1, 2):
        first, last = image.take([0], axis=axis), image.take([-1], axis=axis)
        wide = np.concatenate((first, image, last), axis=axis)
        pairs = wide[:, 1:] + wide[:, :-1] if axis == 1 else wide[:, :, 1:] + wide[:, :, :-1]
        image = pairs[:, 1:] + pairs[:, :-1] if axis == 1 else pairs[:, :, 1:] + pairs[:, :, :-1]
        image *= np.float32(0.25)
    return image
