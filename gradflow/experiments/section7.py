r"""The twelve figures of section 7 of the source, each as one small entry.

What is certain, and what is ours. Of the section we have: the widths, the balanced
start, the default rank and the Gaussian data $x \sim N(0, I/d)$ of 7.1.1; Remark 42;
that Figure 2 shows $\|X - WX\|_F \to (\sum_{i > r} \lambda_i)^{1/2}$ (*erratum*: the
text says $L^1$ does) and Figure 4 the start of Remark 42, whose flow leaves its saddle
by numerical errors; and its subjects, which are the depths 2, 5, 10, 20, balanced and
non-balanced starts, rates against depth, dimension and rank, and the supervised case
(7.2) after the autoencoder (7.1). Not certain, and chosen here: which of the other ten
figures shows which of these, the dimensions, the $3 d$ samples, the law of the
non-balanced start, and the supervised targets (a teacher of full rank, $y = T x$).

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg, *Learning deep linear neural
networks: Riemannian gradient flows and convergence to global minimizers* (2020),
section 7 (numerical results).
"""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree

from .. import datasets
from ..initial import OrthonormalBalancedInit
from ..models.linear import DeepLinear
from ..moments import Moments
from ..types import Key


# Standard deviation of what is added to balanced factors, times the root of d. Beyond
# about 1 a product of 20 has singular values so small that escaping takes for ever.
IMBALANCE = 0.25
# Samples per dimension.
SAMPLES = 3
# Names of axes.
AXES = {
    "depth": "depth $N$",
    "dimension": "dimension $d$",
    "rank": "rank $r$",
    "distance": r"$\|W - W^*\|_F$",
    "residual": r"$\|Y - WX\|_F$",
    "rate": r"rate of $\|W - W^*\|_F$",
    "remark42": r"$\|W\|_F$",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The rows of one figure: every combination of these."""

    depths: tuple[int, ...] = (2,)
    dimensions: tuple[int, ...] = (8,)
    ranks: tuple[int | None, ...] = (None,)
    "None is the source's default, half the dimension rounded up."


@dataclasses.dataclass(frozen=True)
class Figure:
    """What one figure shows.

    - `measure`: the distance to the minimizer, the residual $\\|Y - WX\\|_F$, or the
      rate fitted to the distance; against time, or against the entry `against` of the
      table.
    - `panel`, `color`: the entries of the table that rows of one panel, and of one
      color, have in common.
    """

    title: str
    measure: Literal["distance", "residual", "rate", "remark42"]
    color: str
    quick: Sizes
    paper: Sizes
    panel: str = "start"
    against: str = "time"
    data: Literal["autoencoder", "supervised"] = "autoencoder"
    starts: tuple[str, ...] = ("balanced",)


_BOTH = ("balanced", "non-balanced")
_DEPTHS = Sizes(depths=(2, 5, 10))
_FEW_DEPTHS = Sizes(depths=(2, 5))
_ALL_DEPTHS = Sizes(depths=(2, 5, 10, 20), dimensions=(20,))

FIGURES = {
    1: Figure(
        "autoencoder, balanced: distance to the projector",
        "distance",
        "depth",
        _DEPTHS,
        _ALL_DEPTHS,
    ),
    2: Figure(
        "autoencoder, balanced: reconstruction error",
        "residual",
        "depth",
        _DEPTHS,
        _ALL_DEPTHS,
    ),
    3: Figure(
        "autoencoder, balanced: dimensions",
        "distance",
        "dimension",
        Sizes(depths=(2, 5), dimensions=(4, 8)),
        Sizes(depths=(2, 10), dimensions=(10, 20, 40)),
        panel="depth",
    ),
    4: Figure(
        "autoencoder from Remark 42: exact and numerical flow",
        "remark42",
        "dimension",
        Sizes(dimensions=(3, 8), ranks=(1,)),
        Sizes(dimensions=(5, 10, 20), ranks=(1,)),
    ),
    5: Figure(
        "autoencoder, non-balanced: distance to the projector",
        "distance",
        "depth",
        _FEW_DEPTHS,
        _ALL_DEPTHS,
        starts=("non-balanced",),
    ),
    6: Figure(
        "autoencoder, non-balanced: reconstruction error",
        "residual",
        "depth",
        _FEW_DEPTHS,
        _ALL_DEPTHS,
        starts=("non-balanced",),
    ),
    7: Figure(
        "autoencoder: rate against depth",
        "rate",
        "start",
        Sizes(depths=(2, 3, 5)),
        Sizes(depths=(2, 3, 5, 10, 20), dimensions=(20,)),
        panel="data",
        against="depth",
        starts=_BOTH,
    ),
    8: Figure(
        "autoencoder, balanced: rate against dimension",
        "rate",
        "depth",
        Sizes(dimensions=(4, 6, 8)),
        Sizes(depths=(2, 5), dimensions=(5, 10, 15, 20, 30, 40)),
        against="dimension",
    ),
    9: Figure(
        "autoencoder, balanced: rate against rank",
        "rate",
        "depth",
        Sizes(ranks=(1, 2, 4, 6)),
        Sizes(depths=(2, 5), dimensions=(20,), ranks=(1, 2, 5, 10, 15, 19)),
        against="rank",
    ),
    10: Figure(
        "supervised, balanced: distance to the best matrix",
        "distance",
        "depth",
        _DEPTHS,
        _ALL_DEPTHS,
        data="supervised",
    ),
    11: Figure(
        "supervised, non-balanced: distance to the best matrix",
        "distance",
        "depth",
        _FEW_DEPTHS,
        _ALL_DEPTHS,
        data="supervised",
        starts=("non-balanced",),
    ),
    12: Figure(
        "supervised: prediction error",
        "residual",
        "depth",
        _FEW_DEPTHS,
        _ALL_DEPTHS,
        data="supervised",
        starts=_BOTH,
    ),
}


def moments(kind: str, key: Key, dimension: int) -> Moments:
    """The data of one figure: the same for all rows of one dimension."""
    key = jr.fold_in(key, dimension)
    samples = SAMPLES * dimension
    if kind == "autoencoder":
        return datasets.gaussian(key, dimension, samples)
    return datasets.teacher(key, dimension, dimension, dimension, samples)


class NonBalancedInit(eqx.Module):
    """The start of section 7.1.1 plus independent Gaussian entries."""

    balanced: OrthonormalBalancedInit
    size: float

    def __call__(self, key: Key) -> DeepLinear:
        flat, unravel = ravel_pytree(self.balanced(key))
        noise = jr.normal(jr.fold_in(key, 1), flat.shape, flat.dtype)
        return unravel(flat + self.size * noise)


def start(
    kind: str, widths: tuple[int, ...]
) -> OrthonormalBalancedInit | NonBalancedInit:
    """The start of one row."""
    balanced = OrthonormalBalancedInit(widths)
    if kind == "balanced":
        return balanced
    return NonBalancedInit(balanced, IMBALANCE / widths[0] ** 0.5)


def remark42_start(leading: jax.Array) -> DeepLinear:
    """$W_1 = u_1^\\top$, $W_2 = -u_1$ for the leading eigenvector $u_1$."""
    return DeepLinear((leading[None, :], -leading[:, None]))


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table and what is drawn of it: runs of curves at `times`, or one
    number per run; lines of theory; and the notes on its draws."""

    table: dict[str, Any]
    times: np.ndarray
    runs: np.ndarray
    lines: list[dict[str, Any]]
    notes: list[str]


def panels(entry: Figure, rows: list[Row]) -> list[dict[str, Any]]:
    """What is drawn: rows gathered into panels and colors."""
    panels = []
    for value in dict.fromkeys(row.table.get(entry.panel) for row in rows):
        members = [row for row in rows if row.table.get(entry.panel) == value]
        panel = {
            "title": _label(entry.panel, value),
            "xlabel": AXES.get(entry.against, entry.against),
            "ylabel": AXES[entry.measure],
            "xscale": "log" if entry.measure == "residual" else "linear",
            "yscale": "linear" if entry.measure == "residual" else "log",
        }
        gather = _rate_sets if entry.measure == "rate" else _curve_sets
        if entry.measure == "remark42":
            panel["line"] = "exact flow"
        panels.append(panel | gather(entry, members))
    return panels


def _curve_sets(entry: Figure, rows: list[Row]) -> dict[str, Any]:
    sets = [
        {
            "label": _label(entry.color, row.table[entry.color]),
            "x": row.times,
            "runs": row.runs,
        }
        for row in rows
    ]
    return {"sets": sets, "lines": [line for row in rows for line in row.lines]}


def _rate_sets(entry: Figure, rows: list[Row]) -> dict[str, Any]:
    sets, lines = [], []
    for value in dict.fromkeys(row.table[entry.color] for row in rows):
        members = [row for row in rows if row.table[entry.color] == value]
        x = [row.table[entry.against] for row in members]
        runs = np.array([row.runs for row in members]).T
        # Smaller and smaller, so that equal rates of several sets are all seen.
        style = {"ms": max(7.0 - 2.5 * len(sets), 2.0)}
        name = _label(entry.color, value)
        sets.append({"label": name, "x": x, "runs": runs, "style": style})
        lines.append({"x": x, "y": [row.table["rate in theory"] for row in members]})
    return {"sets": sets, "lines": lines, "points": True}


def _label(key: str, value: Any) -> str:
    """How one entry of the table is named in a figure."""
    names = {"depth": "$N$", "dimension": "$d$", "rank": "$r$"}
    return f"{names[key]} = {value}" if key in names else str(value)
