"""Panels on posterior collapse: phase diagrams, and when latents become active."""

from collections.abc import Sequence
from typing import Any

import numpy as np


# Of cells; theory's black lines are seen on all of them.
SHADES = ("#F0E442", "#56B4E9", "#BBBBBB", "#009E73", "#CC79A7", "#E69F00", "#FFFFFF")
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def phases(panel: dict[str, Any], axes: Any) -> Any:
    """A phase diagram: `cells` hold the number of what was found, `names` their
    names; `lines` are where theory changes from one to the next."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names, x, y = panel["names"], np.array(panel["x"]), np.array(panel["y"])
    shades = [SHADES[i % len(SHADES)] for i in range(len(names))]
    # Sizes and correlations lie beside each other, however they are spaced.
    even = panel["yscale"] == "linear"
    axes.pcolormesh(
        _edges(x),
        np.arange(len(y) + 1) - 0.5 if even else _edges(y),
        np.array(panel["cells"]),
        cmap=ListedColormap(shades),
        vmin=-0.5,
        vmax=len(names) - 0.5,
    )
    for line in panel["lines"]:
        at = np.array(line["x"], dtype=float)
        if even:
            places = np.arange(len(y))
            axes.vlines(at, places - 0.5, places + 0.5, color="black", lw=1)
        else:
            axes.plot(at, np.array(line["y"]), color="black", lw=1)
    axes.set(xscale="log", xlabel=panel["xlabel"], ylabel=panel["ylabel"])
    axes.set_xlim(_edges(x)[[0, -1]])
    _ticks(axes.xaxis, x)
    if even:
        axes.set_yticks(np.arange(len(y)), [f"{value:g}" for value in y])
    else:
        axes.set_yscale("log")
        axes.set_ylim(_edges(y)[[0, -1]])
        _ticks(axes.yaxis, y)
    axes.legend(
        handles=[Patch(color=c, label=n) for c, n in zip(shades, names, strict=True)],
        fontsize=7,
        title=panel["what"],
        title_fontsize=7,
        handlelength=1,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        borderpad=0,
    )
    axes.set_title(panel["title"], fontsize=8)
    return axes


def activation(curves: dict[str, Any], axes: Any, colors: Sequence[str]) -> Any:
    """What each latent knows against time; lines: what it ends at, and when a mode that
    grows at its rate from the size of the start is of size 1."""
    times = np.array(curves["times"])
    for i, run in enumerate(curves["nats"]):
        nats = np.array(run, dtype=float)
        axes.plot(times, nats, color=colors[i % len(colors)], lw=1.2)
    for end in curves["ends"]:
        axes.axhline(end, color="black", lw=0.6, zorder=0)
    for time in curves["predicted"]:
        axes.axvline(time, color="black", lw=0.6, ls=":", zorder=0)
    axes.set(xscale="log", xlabel="time", ylabel="nats of each latent")
    axes.set_title("VAE from a small start", fontsize=8)
    return axes


def _ticks(axis: Any, values: np.ndarray) -> None:
    """A few round values, where a logarithmic axis would write too many."""
    low, high = _edges(values)[[0, -1]]
    show_ticks(axis, [tick for tick in TICKS if low < tick < high])


def show_ticks(axis: Any, ticks: Any) -> None:
    """These and no others, written out."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _edges(centers: np.ndarray) -> np.ndarray:
    """Of cells around values that are evenly spaced in logarithm."""
    half = np.sqrt(centers[1] / centers[0])
    return np.append(centers / half, centers[-1] * half)
