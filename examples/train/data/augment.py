"""Changes of images, each a function of bytes and of uniform numbers in [0, 1) drawn for them."""

import numpy as np

PAD = 4


def pad_crop(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Pads each image with zeros and cuts a window of the old size out of it; draws 0 and 1 say where."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (1, 2))
    top, left = (draws[:, :2] * (2 * PAD + 1)).astype(int).T
    return np.moveaxis(windows[np.arange(len(images)), top, left], 1, -1)


def flip(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mirrors half of the images; draw 4 says which."""
    return np.where((draws[:, 4] < 0.5)[:, None, None, None], images[:, :, ::-1], images)


def pad_crop_flip(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    return flip(pad_crop(images, draws), draws)


def random_box(width: int, height: int, draws: np.ndarray) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of 8% to 100% of the area and of ratio 3/4 to 4/3, from draws 0 to 3."""
    area, ratio = width * height * (0.08 + 0.92 * draws[0]), (3 / 4) ** (1 - 2 * draws[1])
    wide, high = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
    left, top = (width - wide) * draws[2], (height - high) * draws[3]
    return float(left), float(top), float(left + wide), float(top + high)


def central_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The central square of 7/8 of the shorter side, as 224 pixels of 256."""
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
