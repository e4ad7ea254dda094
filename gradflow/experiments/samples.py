"""Samples of MNIST for training: its images, or Gaussian stand-ins."""

from pathlib import Path

import numpy as np

from ..datasets import mnist, mnist_images
from ..moments import Moments


SIDE = 28


def mnist_samples(
    images: str | None, digit: int | None, seed: int
) -> tuple[str, np.ndarray]:
    """What the samples are, and the training images of a digit (`None`: of all), pixels
    from 0 to 1, in a folder of the published files; without one, as many Gaussian
    samples of mean 0 whose expected second moments are MNIST's.

    **Raises:** as `datasets.mnist_images`.
    """
    if images is not None:
        rows, labels = mnist_images(Path(images).expanduser())
        rows = rows if digit is None else rows[labels == digit]
        return "MNIST images", (rows / np.float32(255)).astype(np.float32)
    moments = mnist(digit)
    values, vectors = np.linalg.eigh(np.asarray(moments.xx, np.float64))
    root = vectors * np.sqrt(np.maximum(values, 0))[None, :]
    normal = np.random.default_rng(seed).standard_normal(
        (moments.count, len(root)), np.float32
    )
    return "Gaussian samples of MNIST's moments", normal @ root.T.astype(np.float32)


def quadrants(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x, the bottom left quadrant of each image, and y, the other three: the quadrant
    task of `datasets.mnist`."""
    inside = np.zeros((SIDE, SIDE), bool)
    inside[SIDE // 2 :, : SIDE // 2] = True
    return rows[:, inside.ravel()], rows[:, ~inside.ravel()]


def centered_moments(x: np.ndarray, y: np.ndarray | None = None) -> Moments:
    """What linear maps with biases see of the rows."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=0)
    if y is None:
        return Moments.from_data(x)
    y = np.asarray(y, np.float64)
    return Moments.from_data(x, y - y.mean(axis=0))
