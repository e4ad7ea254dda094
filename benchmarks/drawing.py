"""Figures of benchmark tables: one panel for each comparison, one bar for each row."""

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt  # noqa: E402


OURS, OTHERS = "#1f77b4", "#9a9a9a"


def comparisons(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The table cut where a new baseline begins."""
    found: list[list[dict[str, Any]]] = []
    for row in rows:
        if row["speed over baseline"] == 1.0 or not found:
            found.append([])
        found[-1].append(row)
    return found


def bars(rows: list[dict[str, Any]], path: Path) -> None:
    """Speeds over the first row of each comparison, on a logarithmic axis."""
    panels = comparisons(rows)
    heights = [len(panel) + 1.2 for panel in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(8, 0.28 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        names = [row["what"] for row in panel]
        speeds = [row["speed over baseline"] for row in panel]
        colors = [OURS if "gradflow" in name else OTHERS for name in names]
        drawn = ax.barh(range(len(names)), speeds, color=colors)
        ax.bar_label(drawn, [f" {speed:.3g}" for speed in speeds], fontsize=8)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.invert_yaxis()
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_xscale("log")
        ax.margins(x=0.12)
        ax.set_title(f"{next(iter(panel[0].values()))}", fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("speed over the first row of each panel")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost against each quantity, a panel for each."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure, axes = plt.subplots(
        1,
        len(parts),
        figsize=(2.9 * len(parts) + 0.6, 3.2),
        squeeze=False,
        layout="constrained",
    )
    for ax, part in zip(axes[0], parts, strict=True):
        inside = [row for row in rows if row["part"] == part]
        for what in dict.fromkeys(row["what"] for row in inside):
            line = [row for row in inside if row["what"] == what]
            values = [row["value"] for row in line]
            # A queue is ours whatever the method: its lines differ by workload.
            color = OURS if "gradflow" in what else OTHERS
            color = None if part == "queue" else color
            costs = [row["us per draw"] for row in line]
            ax.plot(values, costs, "o-", color=color, label=what, markersize=4)
        ax.set_xlabel(part)
        ax.set_yscale("log")
        if part in ("draws", "width", "queue"):
            ax.set_xscale("log")
        else:
            ax.set_xticks(sorted({row["value"] for row in inside}))
        ax.spines[["top", "right"]].set_visible(False)
        if part == "queue" or ax is axes[0, 0]:
            ax.legend(fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("microseconds per draw")
    figure.savefig(path, dpi=150)
    plt.close(figure)
