"""Figures: a `Report` drawn. Theory is a thin black line, measurement is color."""

from pathlib import Path
from typing import Any

import numpy as np

from .report import Report


# Okabe and Ito's colors, told apart by color-blind readers too.
COLORS = {
    "global minimum": "#0072B2",
    "saddle": "#D55E00",
    "undecided": "#999999",
    "diverged": "#000000",
}
RUNS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "legend.frameon": False,
}


def convergence(report: Report) -> Any:
    """The figure of the `convergence` experiment: losses above, outcomes below."""
    import matplotlib.pyplot as plt

    panels = report.figure["panels"]
    columns = min(len(panels), 4)
    bands = -(-len(panels) // columns)
    with plt.style.context(STYLE):
        figure = plt.figure(
            figsize=(max(2.0 * columns, 5.5), 1.9 * bands + 0.8 + 0.3 * len(panels)),
            layout="constrained",
        )
        grid = figure.add_gridspec(
            bands + 1,
            columns,
            height_ratios=[*([1.9] * bands), 0.8 + 0.3 * len(panels)],
        )
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            axes = figure.add_subplot(grid[row, column])
            losses(panel, axes)
            if column == 0:
                axes.set_ylabel("loss above the least")
        outcomes(report.rows, figure.add_subplot(grid[bands, :]))
    return figure


def losses(panel: dict[str, Any], axes: Any) -> Any:
    """Loss above the least against time, one line per run, with the critical values
    where runs pause as thin black lines."""
    times = _numbers(panel["times"])
    runs = [_numbers(run) for run in panel["energies"]]
    # What a logarithmic axis can show.
    runs = [np.where(np.isfinite(run) & (run > 0), run, np.nan) for run in runs]
    runs = [run for run in runs if not np.isnan(run).all()]
    for color, run in zip(RUNS * len(runs), runs, strict=False):
        axes.plot(times, run, color=color, lw=1)
    lines = [value for value in panel["lines"] if value > 0]
    for value in lines:
        axes.axhline(value, color="black", lw=0.6, zorder=0)
    if runs and lines:
        highest = max(np.nanmax(run) for run in runs)
        axes.set_ylim(0.03 * min(lines), 2 * max(highest, max(lines)))
    axes.set_title(panel["title"], fontsize=8)
    if not runs:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no run to draw", ha="center", transform=axes.transAxes)
        return axes
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("time")
    return axes


def outcomes(rows: list[dict[str, Any]], axes: Any) -> Any:
    """Stacked bars of what the draws of each row came to, undecided ones never
    hidden, with the exact 95 % interval of the global fraction (thin: with undecided
    draws counted both ways) and the count."""
    from matplotlib.patheffects import Normal, Stroke

    # Seen on every color of bar.
    outlined = [Stroke(linewidth=2.4, foreground="white"), Normal()]
    places = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    for name, color in COLORS.items():
        share = np.array([row[name] / row["draws"] for row in rows])
        axes.barh(places, share, left=left, height=0.55, color=color, label=name)
        left = left + share
    for place, row in zip(places, rows, strict=True):
        ends = [row["95 % low"], row["95 % high"]]
        outer = [row["outer low"], row["outer high"]]
        axes.plot(outer, [place, place], "k-", lw=0.5, path_effects=outlined)
        axes.plot(
            ends, [place, place], "k|-", lw=1.2, ms=5, path_effects=outlined, zorder=3
        )
        count = f"{row['global minimum']} of {row['draws']}"
        axes.text(1.015, place, count, va="center")
    axes.set_yticks(places, [f"depth {r['depth']}, scale {r['scale']:g}" for r in rows])
    axes.set_xlim(0, 1.0)
    label = "fraction of draws, 95 % interval of the global fraction"
    if any(row["undecided"] for row in rows):
        label += " (thin: undecided both ways)"
    axes.set_xlabel(label)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(COLORS), fontsize=7
    )
    return axes


def figures(report: Report) -> Any:
    """A figure of the source: runs in color, theory as thin black lines over them."""
    import matplotlib.pyplot as plt

    panels = report.figure["panels"]
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(
            1,
            len(panels),
            figsize=(max(3.4 * len(panels), 4.6), 3.2),
            layout="constrained",
            squeeze=False,
        )
        for panel, axes in zip(panels, grid[0], strict=True):
            curves(panel, axes)
        figure.suptitle(report.figure["title"], fontsize=9)
    return figure


def curves(panel: dict[str, Any], axes: Any) -> Any:
    """Runs of several sets, one color each; with `points`, the median of each set with
    bars from the smallest to the largest run."""
    for color, group in zip(RUNS * len(panel["sets"]), panel["sets"], strict=False):
        x = _numbers(group["x"])
        runs = np.array([_numbers(run) for run in group["runs"]])
        runs = np.where(np.isfinite(runs), runs, np.nan)
        if panel["yscale"] == "log":
            runs = np.where(runs > 0, runs, np.nan)
        if panel.get("points"):
            seen = ~np.isnan(runs).all(axis=0)
            x, runs = x[seen], runs[:, seen]
            middle = np.nanmedian(runs, axis=0)
            ends = [middle - np.nanmin(runs, axis=0), np.nanmax(runs, axis=0) - middle]
            style = {"fmt": "o", "ms": 4, "capsize": 2, "lw": 1}
            axes.errorbar(x, middle, ends, color=color, label=group["label"], **style)
            continue
        for i, run in enumerate(runs):
            # One name for all runs of a set.
            name = group["label"] if i == 0 else None
            axes.plot(x, run, color=color, lw=1.2, alpha=0.8, label=name)
    for i, line in enumerate(panel["lines"]):
        name = panel.get("line", "theory") if i == 0 else None
        x, y = _numbers(line["x"]), _numbers(line["y"])
        axes.plot(x, y, color="black", lw=0.6, zorder=4, label=name)
    axes.set(**{key: panel[key] for key in ("xlabel", "ylabel", "xscale", "yscale")})
    if panel.get("points"):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(panel["title"], fontsize=8)
    axes.legend(fontsize=7)
    return axes


def _numbers(values: Any) -> np.ndarray:
    """An array of what may come from memory or from JSON, where NaN is null."""
    return np.array([np.nan if v is None else v for v in values], dtype=float)


# The figure of each experiment.
FIGURES = {"convergence": convergence, "figures": figures}


def save(report: Report, folder: Path | str) -> list[Path]:
    """Draws a report's figure into `folder` as PNG and PDF; returns their paths.

    **Raises:** `ValueError` if the report's experiment has no figure.
    """
    import matplotlib.pyplot as plt

    if report.experiment not in FIGURES:
        raise ValueError(
            f"{report.experiment} has no figure: figures exist for {', '.join(FIGURES)}"
        )
    figure = FIGURES[report.experiment](report)
    paths = [Path(folder) / f"{report.experiment}.{kind}" for kind in ("png", "pdf")]
    with plt.style.context(STYLE):
        for path in paths:
            figure.savefig(path)
    plt.close(figure)
    return paths
