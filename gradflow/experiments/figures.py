"""The figures of section 7 of the source: how fast, and to where, do runs converge?

`section7.py` beside this file lists the twelve figures, and says what of their settings
is certain. Times and rates are for the loss divided by the number n of samples; the
source's time is ours divided by n, its rates are ours times n. Residuals are the
source's own, without the division.

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, section 7.
"""

import dataclasses
import itertools
import math
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter
from tqdm import tqdm

from ..audit import Audit
from ..critical import classify, describe, KIND
from ..flow import GradientFlow
from ..initial import section7_widths
from ..models.linear import DeepLinear, SquaredLoss
from ..report import environment, Report, TRAJECTORIES
from ..solution import RESULTS, Solution
from ..solve import integrate, TOLERANCE_RATIO
from ..study import find_device, precision
from ..theory.dynamics import remark42
from ..theory.linear import LinearTheory
from ..theory.rates import autoencoder_rate, balanced_rates, rates
from ..types import names_of
from .base import RunConfig, whole_number
from .section7 import (
    Figure,
    FIGURES,
    moments,
    panels,
    remark42_start,
    Row,
    start,
)
from .verdicts import tally


CLAIM = (
    "Gradient flow of deep linear networks converges to the best matrix of its rank, "
    "at the rate that linearization gives (Bah et al. 2020, section 7, Figures 1-12)."
)
SOURCE = "Bah et al. 2020, section 7"
COST = "about 20 s for each of --figure 1 ... 12; with --paper minutes"
# Observations per run.
TIMES = 200
# A run lasts this many times the slowest relaxation time: e^-22 = 3e-10.
RELAXATIONS = 22.0
# Rates are fitted to where the distance, relative to the size of the minimizer, is
# between these multiples of the solver's tolerance: above its errors, and late enough
# for one mode at the default one.
FIT = (200.0, 20000.0)
# Figure 4 lasts this many times 1 / lambda_1; rounding takes about 37 of them.
ESCAPE_TIMES = 60.0


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one figure, with one row of the table for each shape of network."""

    figure: int = 1
    "Figure of the source, 1 to 12."
    paper: bool = False
    "Depths to 20 and dimensions to 40 as in the source instead of small ones."
    draws: int = 3
    "Starts per row of the same data; Figure 4 has one."
    batch: int = 64
    "Without effect: the few draws of a row are run at once."
    tolerance: float = 1e-7
    "The solver works at a thousandth of this, relative to the size of the point."
    horizon: float = math.inf
    "Flow time at which a run is stopped; by default what the slowest mode needs."
    max_steps: int = 10**5
    "Steps after which a run is given up."

    def __post_init__(self):
        super().__post_init__()
        whole_number(self, "figure", least=1, most=len(FIGURES))
        if not isinstance(self.paper, bool):
            raise ValueError(f"paper must be True or False, got {self.paper!r}")

    @property
    def solver_tolerance(self) -> float:
        """What the solver works at."""
        return self.rtol or self.tolerance / TOLERANCE_RATIO


def run(config: Config, *, progress: bool | None = None) -> Report:
    """Runs one figure and reports one row per shape."""
    device = find_device(config.device)
    entry = FIGURES[config.figure]
    sizes = entry.paper if config.paper else entry.quick
    shapes = list(
        itertools.product(entry.starts, sizes.depths, sizes.dimensions, sizes.ranks)
    )
    began = time.perf_counter()
    # tqdm: None means off where stderr is no terminal.
    hide = None if progress is None else not progress
    with precision(config.dtype), jax.default_device(device):
        run_row = _remark42_row if entry.measure == "remark42" else _row
        rows = [
            run_row(config, entry, *shape)
            for shape in tqdm(shapes, unit=" rows", disable=hide)
        ]
        return Report(
            "figures",
            CLAIM,
            dataclasses.asdict(config),
            environment(config.dtype, device, TRAJECTORIES),
            [row.table for row in rows],
            [note for row in rows for note in row.notes],
            {"title": f"Figure {config.figure}: {entry.title}"}
            | {"panels": panels(entry, rows)},
            {"rows": time.perf_counter() - began},
        )


def _row(
    config: Config, entry: Figure, kind: str, depth: int, dimension: int, rank
) -> Row:
    """Draws of one start and shape, with what theory says of them."""
    key = jr.key(config.seed)
    widths = section7_widths(dimension, depth, rank)
    rank = min(widths)
    energy = SquaredLoss(moments(entry.data, key, dimension))
    theory = LinearTheory(energy, rank)
    slowest = _slowest(theory, depth)
    latest = min(RELAXATIONS / slowest, config.horizon)
    grid = np.linspace(0, latest, TIMES)
    if entry.measure == "residual":
        # For an axis in logarithms; rates are fitted to the evenly spaced part.
        grid = np.union1d(grid[1:], np.geomspace(1e-5 * latest, latest, TIMES))
    points = _starts(start(kind, widths), key, config.draws)
    solution, certified = _runs(
        GradientFlow(energy),
        theory,
        points,
        jnp.asarray(grid),
        config.solver_tolerance,
        jnp.asarray(config.max_steps),
    )
    where = f"{kind}, depth {depth}, dimension {dimension}, rank {rank}"
    kinds, notes = _verdicts(GradientFlow(energy), theory, solution, certified, where)
    assert solution.history is not None  # because times are given
    distances = np.asarray(solution.history["distance"])
    residuals = np.sqrt(2 * energy.moments.count * solution.history["energy"])
    size = float(jnp.linalg.norm(theory.optimum().weight))
    low, high = (times * config.solver_tolerance * size for times in FIT)
    fitted = [fitted_rate(grid, run, low, high) for run in distances]
    limit = math.sqrt(2 * energy.moments.count * float(theory.optimal_energy()))
    known = np.full(config.draws, slowest)
    if kind != "balanced":
        known = _end_rates(theory, solution.point, distances[:, -1] < 5e-4 * size)
    table = {
        "data": entry.data,
        "start": kind,
        "depth": depth,
        "dimension": dimension,
        "rank": rank,
        **tally(kinds),
        "residual": _median(residuals[:, -1]),
        "least residual": limit,
        "distance": _median(distances[:, -1]),
        "rate": _median(fitted),
        "rate in theory": _median(known),
        "median steps": _median(solution.stats["steps"]),
    }
    if entry.measure == "residual":
        lines = [{"x": [grid[0], grid[-1]], "y": [limit, limit]}]
        return Row(table, grid, residuals, lines, notes)
    if entry.measure == "rate":
        return Row(table, grid, np.asarray(fitted), [], notes)
    lines = [
        _tail(grid, run, rate, low, high)
        for run, rate in zip(distances, known, strict=True)
    ]
    return Row(table, grid, distances, lines, notes)


def _remark42_row(
    config: Config, entry: Figure, kind: str, depth: int, dimension: int, rank
) -> Row:
    """The numerical flow beside the exact one, which stays on its way to 0."""
    key = jr.key(config.seed)
    energy = SquaredLoss(moments(entry.data, key, dimension))
    theory = LinearTheory(energy, rank)
    flow, rate = GradientFlow(energy), float(theory.spectrum()[0]) ** 2
    latest = min(ESCAPE_TIMES / rate, config.horizon)
    grid = np.linspace(0, latest, TIMES)
    points = jax.tree.map(lambda x: x[None], remark42_start(theory.left[:, 0]))
    solution, certified = _runs(
        flow,
        theory,
        points,
        jnp.asarray(grid),
        config.solver_tolerance,
        jnp.asarray(config.max_steps),
        Audit,
    )
    where = f"dimension {dimension}"
    kinds, notes = _verdicts(flow, theory, solution, certified, where)
    assert solution.broken is not None  # because an audit was asked for
    limited_at = float(min(np.min(moment) for moment in solution.broken.values()))
    assert solution.history is not None
    sizes = np.asarray(solution.history["size"])
    exact = remark42(rate, grid) ** 2
    left = np.flatnonzero(np.abs(sizes[0] - exact) > 0.5 * exact)
    parted = float(grid[left[0]]) if left.size else math.inf
    end = str(kinds[0])
    if limited_at <= latest:
        # What it came to says nothing about its start.
        kinds[0] = "precision_limited"
        notes.append(
            f"{where}: the exact flow ends at the saddle at 0; the run is "
            f"precision_limited from t={limited_at:.4g} on and ends as {end}"
        )
    # A deviation of eps in W_1 + W_2^T grows like e^(lambda_1 t) while that of the
    # exact flow decays like e^(-lambda_1 t) / sqrt 2: they meet at this time.
    unit = float(jnp.finfo(config.dtype).eps)
    predicted = math.log(1 / (math.sqrt(2) * unit)) / (2 * rate)
    table = {
        "start": "Remark 42",
        "depth": depth,
        "dimension": dimension,
        "rank": rank,
        **tally(kinds),
        "exact end": "saddle at 0",
        "end of the run": end,
        "precision limited at": limited_at,
        "parted at": parted,
        "parting from rounding": predicted,
        "exact size at the end": float(exact[-1]),
        "size at the end": float(sizes[0, -1]),
        "median steps": _median(solution.stats["steps"]),
    }
    return Row(table, grid, sizes, [{"x": grid, "y": exact}], notes)


def fitted_rate(
    times: np.ndarray, distances: np.ndarray, low: float, high: float
) -> float:
    """The rate at which one run's distance falls from `high` to `low`; NaN where it
    was observed there less than 5 times."""
    # Only before it first leaves the window: what comes later is the solver's error.
    inside = (distances < high) & np.isfinite(distances)
    below = np.flatnonzero(distances < low)
    if below.size:
        inside[below[0] :] = False
    if inside.sum() < 5:
        return math.nan
    slope, _ = np.polyfit(times[inside], np.log(distances[inside]), 1)
    return -float(slope)


def _slowest(theory: LinearTheory, depth: int) -> float:
    moments = theory.energy.moments
    if moments.autoencoding:
        values = np.linalg.eigvalsh(np.asarray(moments.xx, float))
        return autoencoder_rate(values, theory.rank, depth)
    return float(balanced_rates(theory, depth)[0])


def _starts(start, key, draws: int):
    # Not compiled as a whole: rows of one dimension share the shapes of their parts.
    points = [start(jr.fold_in(key, draw)) for draw in range(draws)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)


@eqx.filter_jit
def _runs(flow, theory, points, times, rtol, max_steps, audit=None):
    """All draws of a row: their solutions with histories, and which are certified."""
    best = theory.optimum().weight

    def one(point):
        solution = integrate(
            flow,
            point,
            times=times,
            observe={
                "energy": flow.energy,
                "distance": lambda p: jnp.linalg.norm(p.matrix() - best),
                "size": lambda p: jnp.linalg.norm(p.matrix()),
            },
            tolerance=TOLERANCE_RATIO * rtol,
            rtol=rtol,
            max_steps=max_steps,
            audit=audit,
            throw=False,
        )
        return solution, theory.certificate(solution.point)

    return jax.vmap(one)(points)


@eqx.filter_jit
def _inspect(flow, theory, solution):
    return classify(flow, theory, solution)


def _verdicts(flow, theory, solution, certified, where) -> tuple[np.ndarray, list[str]]:
    """The verdict of each draw, and why each undecided one is."""
    # The first rule that `classify` applies, without compiling its Hessian.
    kinds = np.full(certified.shape, "global_minimum", dtype=object)
    notes = []
    for i in np.flatnonzero(~np.asarray(certified)):
        end: Solution = jax.tree.map(lambda leaf: leaf[i], solution)  # noqa: B023
        finding = _inspect(flow, theory, end)
        kinds[i] = names_of(KIND, finding.kind)[()]
        if kinds[i] in ("unresolved", "not_critical"):
            result = names_of(RESULTS, end.result)[()]
            notes.append(
                f"{where}, draw {i}: {result} at t={float(end.time):.4g}; "
                + describe(finding)
            )
    return kinds, notes


def _end_rates(theory: LinearTheory, points, arrived: np.ndarray) -> np.ndarray:
    """The smallest rate at the minimizer where each run ended; NaN if it did not."""
    found = np.full(arrived.shape, math.nan)
    for i in np.flatnonzero(arrived):
        end: DeepLinear = jax.tree.map(lambda leaf: leaf[i], points)  # noqa: B023
        found[i] = rates(theory, end)[0]
    return found


def _median(values: Any) -> float:
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan


def _tail(times, distances, rate, low, high) -> dict[str, Any]:
    """The exponential of theory through one run, at the middle of where its rate is
    fitted."""
    inside = np.flatnonzero((distances < high) & (distances > low))
    if inside.size == 0 or not math.isfinite(rate):
        return {"x": [], "y": []}
    at = inside[len(inside) // 2]
    begin = distances[at] * math.exp(rate * times[at])
    ends = np.array([min(1e4 * high, begin), low])
    return {"x": times[at] - np.log(ends / distances[at]) / rate, "y": ends}
