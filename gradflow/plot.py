"""Figures: a `Report` drawn. Theory is a thin black line, measurement is color."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import checked_arguments
from .image_plot import mosaics
from .phase_plot import activation, phases, show_ticks
from .report import Report
from .share_plot import shares


# Okabe and Ito's colors, told apart by color-blind readers too.
COLORS = {
    "global minimum": "#0072B2",
    "saddle": "#D55E00",
    "undecided": "#999999",
    "diverged": "#000000",
}
RUNS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# Of the escape times: rounding stands out, and what coincides stays visible.
POINTS = {
    "rounding": {"fmt": "*", "ms": 11, "mec": "black", "mew": 0.5, "zorder": 5},
    "unbalanced": {"fmt": "o", "ms": 7, "mfc": "none"},
    "balanced": {"fmt": "D", "ms": 4},
    "separated": {"ms": 3, "mfc": RUNS[3]},
}
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
    axes.set_yticks(places, [_label(row) for row in rows])
    axes.set_xlim(0, 1.0)
    label = "fraction of draws, 95 % interval of the global fraction"
    if any(row["undecided"] for row in rows):
        label += " (thin: undecided both ways)"
    axes.set_xlabel(label)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(COLORS), fontsize=7
    )
    return axes


def saddle_avoidance(report: Report) -> Any:
    """The figure of the `saddle_avoidance` experiment: outcomes of the exact flow with
    what integrating the factors claims, and the least singular value of some runs."""
    import matplotlib.pyplot as plt

    rows, panels = report.rows, report.figure["panels"]
    bands = -(-len(panels) // 2)
    high = 0.9 + 0.26 * len(rows)
    with plt.style.context(STYLE):
        figure = plt.figure(figsize=(7.2, high + 2.1 * bands), layout="constrained")
        heights = [high, *([2.1] * bands)]
        grid = figure.add_gridspec(bands + 1, 2, height_ratios=heights)
        axes = outcomes(rows, figure.add_subplot(grid[0, :]))
        claimed = [row["factors: global"] / row["draws"] for row in rows]
        places = np.arange(len(rows))[::-1]
        axes.plot(
            claimed, places, "D", color="black", mfc="white", ms=5, clip_on=False,
            label="claimed by integrating the factors", zorder=4,
        )  # fmt: skip
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=5, fontsize=7)
        for i, panel in enumerate(panels):
            row, column = divmod(i, 2)
            below = figure.add_subplot(grid[1 + row, column])
            for road, color in (("exact", RUNS[0]), ("factors", RUNS[5])):
                name = "balanced flow" if road == "exact" else "its factors, Tsit5"
                below.plot(
                    _numbers(panel["times"]), _numbers(panel[road]), color=color,
                    label=name, lw=1.2, ls="-" if road == "exact" else "--",
                )  # fmt: skip
            below.set_title(panel["title"], fontsize=8)
            below.set_xlabel("time")
            if column == 0:
                below.set_ylabel("log10 of least singular value")
            below.legend(fontsize=7)
    return figure


def _label(row: dict[str, Any]) -> str:
    """What a row of outcomes is about."""
    where = f"depth {row['depth']}, "
    if "scale" in row:
        return where + f"scale {row['scale']:g}"
    return where + f"rank {row['rank']}: {row['starts with']}"


def figures(report: Report) -> Any:
    """Panels side by side, in `bands`: runs in color, theory as thin black lines."""
    import matplotlib.pyplot as plt

    panels, bands = report.figure["panels"], report.figure.get("bands", 1)
    columns, wide, high = len(panels) // bands, *((3.4, 3.2), (2.5, 2.3))[bands > 1]
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(
            bands,
            columns,
            figsize=(max(wide * columns, 4.6), high * bands),
            layout="constrained",
            squeeze=False,
            sharey="row" if bands > 1 else False,
        )
        for panel, axes in zip(panels, grid.flat, strict=True):
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
            style = {"fmt": "o", "ms": 4, "capsize": 2, "lw": 1, "color": color}
            style |= group.get("style", {})
            axes.errorbar(x, middle, ends, label=group["label"], **style)
            continue
        for i, run in enumerate(runs):
            # One name for all runs of a set.
            name = group["label"] if i == 0 else None
            style = {"color": color, "lw": 1.2, "alpha": 0.8} | group.get("style", {})
            axes.plot(x, run, label=name, **style)
    for i, line in enumerate(panel["lines"]):
        name = panel.get("line", "theory") if i == 0 else None
        x, y = _numbers(line["x"]), _numbers(line["y"])
        axes.plot(x, y, color="black", lw=0.6, zorder=4, label=name)
    axes.set(**{key: panel[key] for key in ("xlabel", "ylabel", "xscale", "yscale")})
    if "xticks" in panel:
        show_ticks(axes.xaxis, panel["xticks"])
    if panel.get("points") and panel["xscale"] == "linear":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(panel["title"], fontsize=8)
    axes.legend(fontsize=7)
    return axes


def equivalence(report: Report) -> Any:
    """The figure of the `equivalence` experiment: distances against time."""
    import matplotlib.pyplot as plt

    panels = report.figure["panels"]
    columns = min(len(panels), 2)
    bands = -(-len(panels) // columns)
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(
            bands,
            columns,
            figsize=(max(3.4 * columns, 4.6), 2.5 * bands + 0.3),
            layout="constrained",
            squeeze=False,
            sharey=True,
        )
        for panel, axes in zip(panels, grid.flat, strict=False):
            # Two pairs have almost the same distance: one wide under the other.
            wide, *others = panel["sets"]
            wide = wide | {"style": {"lw": 3.5, "alpha": 0.4}}
            curves(panel | {"sets": [wide, *others]}, axes)
            axes.get_legend().remove()
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=4,
            title=report.figure["title"],
        )
    return figure


def escape(report: Report) -> Any:
    """The figure of the `escape` experiment: runs that nothing but rounding pushes,
    and when planted perturbations and rounding escape."""
    import matplotlib.pyplot as plt

    alone, times = report.figure["panels"]
    tones = {"factors": RUNS[1], "fixed rank": RUNS[2], "separated": RUNS[3]}
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 4.2), layout="constrained"
        )
        curves(alone, left)
        sets = []
        for group in times["sets"]:
            method, dtype, kind = group["label"].split(", ")
            single = method == "factors" and dtype == "float32"
            color = RUNS[0] if single else tones[method]
            style = {"color": color, **POINTS[kind], **POINTS.get(method, {})}
            sets.append(group | {"style": style})
        curves(times | {"sets": sets}, right)
    return figure


def em_versus_flow(report: Report) -> Any:
    """The figure of the `em_versus_flow` experiment: a column for each model, EM above
    the flow."""
    import matplotlib.pyplot as plt

    panels = report.figure["panels"]
    methods = list(dict.fromkeys(panel["sets"][0]["label"] for panel in panels))
    columns = max([1, *(len(panels) // len(methods) for _ in methods)])
    bands = max(1, len(methods))
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(
            bands,
            columns,
            figsize=(max(2.3 * columns, 4.6), 2.1 * bands + 0.3),
            layout="constrained",
            squeeze=False,
        )
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for i, panel in enumerate(panels):
            column, band = divmod(i, bands)
            group = panel["sets"][0] | {"style": {"color": RUNS[band]}}
            axes = curves(panel | {"sets": [group]}, grid[band, column])
            if column > 0:
                axes.set_ylabel("")
    return figure


def posterior_collapse(report: Report) -> Any:
    """The figure of the `posterior_collapse` experiment: what runs found in each cell
    in color, theory's boundaries as lines; and the divergence of each latent against
    time, with the values and the times that theory has."""
    import matplotlib.pyplot as plt

    panels, dynamics = report.figure["panels"], report.figure["dynamics"]
    count = len(panels) + bool(dynamics)
    columns = min(4, count)
    bands = -(-count // columns)
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(
            bands,
            columns,
            figsize=(max(2.6 * columns, 4.6), 2.6 * bands),
            layout="constrained",
            squeeze=False,
        )
        for axes in grid.flat[count:]:
            axes.set_axis_off()
        for panel, axes in zip(panels, grid.flat, strict=False):
            phases(panel, axes)
        if dynamics:
            activation(dynamics, grid.flat[count - 1], RUNS)
    return figure


def own(report: Report) -> Any:
    """The figure of a study of one's own: shares, and distributions of numbers."""
    import matplotlib.pyplot as plt

    panels = report.figure["panels"]
    columns, bands = min(3, len(panels) or 1), -(-len(panels) // 3)
    high = 0.7 + 0.22 * sum(row["count"] != "-" for row in report.rows)
    with plt.style.context(STYLE):
        figure = plt.figure(figsize=(7.2, high + 2.2 * bands), layout="constrained")
        tall = {"height_ratios": [high] + bands * [2.2]}
        grid = figure.add_gridspec(bands + 1, columns, **tall)
        shares(report.rows, figure.add_subplot(grid[0, :]), RUNS[0])
        for place, panel in enumerate(panels, start=columns):
            curves(panel, figure.add_subplot(grid[divmod(place, columns)]))
    return figure


def _numbers(values: Any) -> np.ndarray:
    """An array of what may come from memory or from JSON, where NaN is null."""
    return np.array([np.nan if v is None else v for v in values], dtype=float)


FIGURES = {
    "convergence": convergence,
    "saddle_avoidance": saddle_avoidance,
    "equivalence": equivalence,
    "escape": escape,
    "em_versus_flow": em_versus_flow,
    "posterior_collapse": posterior_collapse,
    **dict.fromkeys(("figures", "flow_versus_training", "nonlinear_cvae"), figures),
    "nonlinear_hvae": partial(mosaics, curves=curves, style=STYLE),
    "own": own,
    **dict.fromkeys(("mnist_cvae", "mnist_hvae", "collapse_training"), figures),
}


@checked_arguments
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
            # Laid out once: that takes as long as drawing.
            figure.set_layout_engine("none")
    plt.close(figure)
    return paths
