"""Shares with their intervals, one below the other."""

from typing import Any

import numpy as np


def shares(rows: list[dict[str, Any]], axes: Any, color: str) -> Any:
    """The share of each row that has one with its exact 95 % interval (thin: with
    undecided draws counted both ways) and the count."""
    rows = [row for row in rows if row["count"] != "-"]
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        ends = [row["95 % low"], row["95 % high"]]
        outer = [row["outer low"], row["outer high"]]
        axes.plot(outer, [place, place], "-", color=color, lw=0.6)
        axes.plot(ends, [place, place], "|-", color=color, lw=1.4, ms=6)
        axes.plot(row["count"] / row["draws"], place, "o", color=color, ms=4)
        axes.text(1.03, place, f"{row['count']} of {row['draws']}", va="center")
    axes.set_yticks(places, [f"{row['study']}: {row['finding']}" for row in rows])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    label = "share of draws, 95 % interval"
    if any(row["undecided"] for row in rows):
        label += " (thin: undecided both ways)"
    axes.set_xlabel(label)
    return axes
