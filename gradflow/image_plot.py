"""Panels of images, above panels of curves."""

from collections.abc import Callable
from typing import Any

import numpy as np


SIDE = 28


def mosaics(report: Any, curves: Callable[..., Any], style: dict[str, Any]) -> Any:
    """A mosaic of images for each cell of a grid, and below them the panels, which
    `curves` draws."""
    import matplotlib.pyplot as plt

    cells, columns = report.figure["cells"], report.figure["columns"]
    panels, bands = report.figure["panels"], -(-len(cells) // columns)
    # Of one band of mosaics and its title, in inches.
    wide = 2.6
    rows, shown = np.shape(cells[0]["images"])
    high = wide * rows / shown + 0.45
    with plt.style.context(style):
        figure = plt.figure(
            figsize=(max(wide * columns, 6.8), high * bands + 2.9), layout="constrained"
        )
        parts: Any = figure.subfigures(2, 1, height_ratios=[high * bands + 0.4, 2.5])
        above, below = parts
        grid = above.subplots(bands, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for cell, axes in zip(cells, grid.flat, strict=False):
            mosaic(cell["images"], axes)
            axes.set_title(cell["title"], fontsize=7)
        for panel, axes in zip(
            panels, below.subplots(1, len(panels), squeeze=False)[0], strict=True
        ):
            curves(panel, axes)
            # The same for all: once is enough.
            if panel is not panels[-1]:
                axes.get_legend().remove()
        above.suptitle(report.figure["title"], fontsize=8)
    return figure


def mosaic(bands: list[list[str]], axes: Any) -> None:
    """Bands of images, each as hexadecimal numbers, one below the other."""
    images = [
        [np.frombuffer(bytes.fromhex(image), np.uint8) for image in band]
        for band in bands
    ]
    whole = np.array(images).reshape(len(bands), -1, SIDE, SIDE)
    flat = whole.transpose(0, 2, 1, 3).reshape(len(bands) * SIDE, -1)
    axes.imshow(flat, cmap="gray", vmin=0, vmax=255)
