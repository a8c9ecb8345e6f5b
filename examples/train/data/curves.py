"""CURVES: drawings of a curve through three random points, after Hinton and Salakhutdinov (2006).

The images of that paper are a file that its authors publish; these are drawn anew, so that numbers are alike and not
the same.
"""

import numpy as np

from examples.train.data.source import Images

SIDE, MARGIN, POINTS = 28, 3, 64


def load(seed: int, training: int = 20_000, validation: int = 10_000) -> tuple[Images, Images]:
    """So many images of each kind, 28×28×1."""
    images, labels = draw(seed, training + validation), np.zeros(training + validation, np.int32)
    return Images(images[:training], labels[:training]), Images(images[training:], labels[training:])


def draw(seed: int, number: int) -> np.ndarray:
    """Quadratic Bézier curves from the first point to the third that pass the second half-way."""
    first, middle, last = np.random.default_rng(seed).uniform(MARGIN, SIDE - 1 - MARGIN, (3, number, 1, 2))
    control = np.clip(2 * middle - (first + last) / 2, 0, SIDE - 1.001)
    t = np.linspace(0, 1, POINTS)[:, None]
    curve = (1 - t) ** 2 * first + 2 * t * (1 - t) * control + t**2 * last  # (number, POINTS, 2)
    # Each point leaves ink on the four pixels around it, more on the nearer ones.
    corner = np.floor(curve).astype(int)
    near = curve - corner
    image = np.arange(number)[:, None]
    ink = np.zeros(number * SIDE * SIDE)
    for row in (0, 1):
        for column in (0, 1):
            share = np.abs(1 - row - near[..., 0]) * np.abs(1 - column - near[..., 1])
            pixel = (image * SIDE + corner[..., 0] + row) * SIDE + corner[..., 1] + column
            ink += np.bincount(pixel.ravel(), share.ravel(), len(ink))
    return (255 * np.minimum(ink, 1)).astype(np.uint8).reshape(number, SIDE, SIDE, 1)
