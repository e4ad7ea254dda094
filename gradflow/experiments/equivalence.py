r"""Are three ways to write the balanced flow one flow?

The balanced flow of $N$ factors, the Riemannian flow of their product $W$ on the
matrices of rank $k$ with the metric of depth $N$, and the same in coordinates of rank
$k$ start at the same $W$ and are compared at common times: on supervised data, on data
whose modes decouple, and for depth 2 on whitened data; the latter two have closed
forms.

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, Corollary 17.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import time
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter

from .. import datasets
from ..flow import GradientFlow
from ..manifolds.fixed_rank import FixedRank
from ..models.linear import LinearMap, SquaredLoss
from ..models.low_rank import LowRank
from ..moments import Moments
from ..report import environment, Report, TRAJECTORIES
from ..solution import RESULTS
from ..solve import integrate, TOLERANCE_RATIO
from ..study import find_device, precision
from ..theory.dynamics import decoupled_mode, whitened_two_layer
from ..types import names_of
from .base import LARGEST_COUNT, positive, RunConfig, whole_number


CLAIM = (
    "The balanced flow of the factors and the Riemannian flow of their product, in "
    "ambient and in factored coordinates, are one flow (Bah et al. 2020, Corollary 17)."
)
SOURCE = "Bah et al. 2020, Corollary 17"
COST = "70 s of processor time, nearly all of it compilation, for the default settings"
ROADS = ("factors", "product", "factored")
PAIRS = (("product", "factors"), ("factored", "factors"), ("factored", "product"))
# Of order 8: the product's errors are relative to W as a whole, large for a singular
# value of 1e-6, and add up over steps. At rtol 1e-10 and depth 2 those of Tsit5 come to
# 2e-6 at sigma t = 4, these to 5e-10.
METHOD = diffrax.Dopri8()
TIMES = 20
KINDS = ("supervised", "decoupled", "whitened")
# The modes of the decoupled data: entries of xx and of yx.
GRAM, DRIVE = (0.5, 1.5), (1.0, 0.25)
# Per dimension, of the supervised and the whitened data.
SAMPLES = 3


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one row of the table for each depth, rank and smallest value."""

    dimension: int = 4
    "Inputs and outputs."
    depths: tuple[int, ...] = (2, 3, 5, 10)
    "Numbers of factors."
    ranks: tuple[int, ...] = (2, 4)
    "Ranks of the start."
    smallest: tuple[float, ...] = (1.0, 1e-6)
    "Smallest singular values of the start; the largest is 1."
    draws: int = 4
    "Starts per row, each on two kinds of data, and on a third for depth 2."
    tolerance: float = 1e-7
    "The solver works at a thousandth of this, relative to the size of the point."
    horizon: float = 2.0
    "Last of the times compared, in units of 1 / the largest singular value of yx."
    max_steps: int = 10**5
    "Steps after which a run is given up."

    def __post_init__(self):
        super().__post_init__()
        for name in ("dimension", "ranks"):
            whole_number(self, name, least=1, most=LARGEST_COUNT)
        whole_number(self, "depths", least=2, most=LARGEST_COUNT)
        positive(self, "smallest")
        positive(self, "horizon")
        for rank in self.ranks:
            if rank > self.dimension:
                raise ValueError(
                    f"ranks has {rank}, which is larger than dimension="
                    f"{self.dimension}: lower it or raise dimension"
                )
        for value in self.smallest:
            if value > 1:
                raise ValueError(
                    f"smallest has {value}, but the largest singular value is 1: give "
                    "numbers <= 1"
                )


def run(config: Config, *, progress: bool | None = None) -> Report:
    """Runs the three roads and reports their distances, one row per kind of start."""
    del progress  # rows are few and quick
    device = find_device(config.device)
    times = np.linspace(0, config.horizon, TIMES + 1)[1:]
    rows, notes, seconds = [], [], {"roads": 0.0, "closed forms": 0.0}
    furthest: dict[int, list[dict[str, np.ndarray]]] = {n: [] for n in config.depths}
    with precision(config.dtype), jax.default_device(device):
        drawn = _drawn(config)
        for depth, rank in itertools.product(config.depths, config.ranks):
            starts = _starts(config, drawn, depth, rank)
            began = time.perf_counter()
            roads = _all_roads(config, device, depth, rank, starts, times)
            middle = time.perf_counter()
            exact = _closed_forms(config, drawn, depth, rank, starts, times)
            seconds["roads"] += middle - began
            seconds["closed forms"] += time.perf_counter() - middle
            for i, smallest in enumerate(config.smallest):
                mine = {
                    road: {k: v[i] for k, v in seen.items()}
                    for road, seen in roads.items()
                }
                distances = _distances(mine, exact[i])
                row = {"depth": depth, "rank": rank, "smallest": smallest}
                rows.append(row | _row(mine, distances))
                notes += _notes(", ".join(f"{k} {v:g}" for k, v in row.items()), mine)
                furthest[depth].append(distances)
    title = "one flow, three ways: largest distance over all starts"
    panels = [_panel(depth, times, found) for depth, found in furthest.items()]
    return Report(
        "equivalence",
        CLAIM,
        dataclasses.asdict(config),
        environment(config.dtype, device, TRAJECTORIES),
        rows,
        notes,
        {"title": title, "panels": panels},
        seconds,
    )


class Starts(NamedTuple):
    """Moments and singular value decompositions; axes: smallest value, kind of data,
    draw."""

    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray
    left: np.ndarray
    log_values: np.ndarray
    right: np.ndarray


def _drawn(config: Config) -> tuple[np.ndarray, ...]:
    """For each draw two orthogonal matrices and the moments of a teacher's data, scaled
    so that the largest singular value of yx is 1."""
    draws = jnp.arange(config.draws)
    found = _draws(jr.key(config.seed), draws, config.dimension)
    return tuple(map(np.asarray, found))


@eqx.filter_jit
def _draws(key, draws, size):
    def one(i):
        frames, data = jr.split(jr.fold_in(key, i))
        moments = datasets.teacher(data, size, size, size, SAMPLES * size)
        left, right = jr.orthogonal(frames, size, (2,))
        # Errors grow like e^(2 sigma t), and this fixes the unit of time.
        sigma = jnp.linalg.norm(moments.xy, ord=2)
        return left, right, moments.xx, moments.xy / sigma, moments.yy / sigma**2

    return jax.vmap(one)(draws)


def _starts(config: Config, drawn: tuple, depth: int, rank: int) -> Starts:
    """Supervised, decoupled and, for depth 2, whitened data, with the same starts but
    for signs of modes."""
    left, right, xx, xy, yy = drawn
    turned = np.swapaxes(right, -1, -2)
    gram = (right * np.linspace(*GRAM, config.dimension)) @ turned
    drive = (left * np.linspace(*DRIVE, config.dimension)) @ turned
    back = np.swapaxes(drive, -1, -2)
    white = np.broadcast_to(np.eye(config.dimension), xx.shape)
    kinds = [
        (xx, xy, yy),
        (gram, back, drive @ back),
        (white, xy, np.swapaxes(xy, -1, -2) @ xy),
    ][: 3 if depth == 2 else 2]
    logs = [np.log(_values(rank, smallest)) for smallest in config.smallest]
    sides = left[:, :, :rank] * _signs(rank), right[:, :, :rank]
    count = len(config.smallest), len(kinds), config.draws
    spread = lambda array: np.broadcast_to(array, (*count, *array.shape[-2:]))
    xx, xy, yy = (spread(np.stack(moment)) for moment in zip(*kinds, strict=True))
    values = np.broadcast_to(np.array(logs)[:, None, None], (*count, rank))
    return Starts(xx, xy, yy, spread(sides[0]), values, spread(sides[1]))


def _values(rank: int, smallest: float) -> np.ndarray:
    """From 1 to the smallest, evenly in logarithm; a single one is the smallest."""
    return smallest ** np.linspace(1 if rank == 1 else 0, 1, rank)


def _signs(rank: int) -> np.ndarray:
    """Modes that decay, their sign being wrong, and modes that grow, in turn."""
    return np.where(np.arange(rank) % 2, 1.0, -1.0)


def _all_roads(
    config: Config, device: Any, depth: int, rank: int, starts: Starts, times
) -> dict[str, dict[str, np.ndarray]]:
    """W(t) on each road, with how each run ended."""
    rtol = config.rtol or config.tolerance / TOLERANCE_RATIO

    def task(road):
        # jax's settings are those of one thread.
        with precision(config.dtype), jax.default_device(device):
            flat = [jnp.asarray(_flat(leaf, 3), config.dtype) for leaf in starts]
            most = jnp.asarray(config.max_steps)
            path, result, steps = _runs(
                road, depth, rank, flat, jnp.asarray(times), rtol, most
            )
            found = {
                "W": np.asarray(path, float),
                "result": names_of(RESULTS, result),
                "steps": np.asarray(steps),
            }
            axes = starts.xx.shape[:3]
            return {k: v.reshape(*axes, *v.shape[1:]) for k, v in found.items()}

    # One compiles while another runs.
    with concurrent.futures.ThreadPoolExecutor(len(ROADS)) as pool:
        return dict(zip(ROADS, pool.map(task, ROADS), strict=True))


@partial(
    jax.jit,
    static_argnames=("road", "depth", "rank", "rtol"),
    # Compilation is nearly all of the time, and a third less without optimization.
    compiler_options={"xla_backend_optimization_level": 0},
)
def _runs(road, depth, rank, starts, times, rtol, max_steps):
    def one(xx, xy, yy, left, log_values, right):
        energy = SquaredLoss(Moments(xx, xy, yy, 1))
        start = LowRank(left, log_values, right)
        flow, point = GradientFlow(energy, FixedRank(rank, depth)), start
        if road == "product":
            point = LinearMap(start.matrix())
        if road == "factors":
            flow, point = GradientFlow(energy), start.balanced(depth)
        solution = integrate(
            flow,
            point,
            times=times,
            observe={"W": lambda p: p.matrix()},
            tolerance=TOLERANCE_RATIO * rtol,
            rtol=rtol,
            method=METHOD,
            max_steps=max_steps,
            throw=False,
        )
        assert solution.history is not None  # because times are given
        return solution.history["W"], solution.result, solution.stats["steps"]

    return jax.vmap(one)(*starts)


def _closed_forms(
    config: Config, drawn: tuple, depth: int, rank: int, starts: Starts, times
) -> np.ndarray:
    """W(t) in closed form, NaN where there is none; axes as `starts`, then times."""
    axes, size = starts.xx.shape[:3], config.dimension
    exact = np.full((*axes, len(times), size, size), np.nan)
    left, right, *_ = drawn
    gram, drive = (np.linspace(*ends, size)[:rank] for ends in (GRAM, DRIVE))
    for i, smallest in enumerate(config.smallest):
        begun = _signs(rank) * _values(rank, smallest)
        modes = [
            decoupled_mode(*mode, depth, times)
            for mode in zip(begun, drive, gram, strict=True)
        ]
        sides = left[:, None, :, :rank], np.swapaxes(right[:, None, :, :rank], -1, -2)
        exact[i, 1] = (sides[0] * np.array(modes).T[:, None]) @ sides[1]
    if depth == 2:
        flat = [_flat(leaf[:, 2], 2) for leaf in starts]
        exact[:, 2] = np.reshape(_whitened(flat, times), exact[:, 2].shape)
    return exact


@eqx.filter_jit
def _whitened(starts, times):
    def one(xx, xy, yy, left, log_values, right):
        moments = Moments(xx, xy, yy, 1)
        network = LowRank(left, log_values, right).balanced(2)
        closed = lambda t: whitened_two_layer(moments, network, t).matrix
        return jax.vmap(closed)(times)

    return jax.vmap(one)(*map(jnp.asarray, starts))


def _distances(roads: dict, exact: np.ndarray) -> dict[str, np.ndarray]:
    """Between each pair of roads and to the closed form; axes: kind, draw, time."""
    size = lambda gap: np.linalg.norm(gap, axis=(-2, -1))
    found = {f"{a} v {b}": size(roads[a]["W"] - roads[b]["W"]) for a, b in PAIRS}
    to_exact = [size(roads[road]["W"] - exact) for road in ROADS]
    return found | {"closed form": np.max(to_exact, axis=0)}


def _row(roads: dict, distances: dict[str, np.ndarray]) -> dict[str, Any]:
    # A run that failed has no distances from there on.
    failed = np.any([_failed(road) for road in roads.values()], axis=(0, 1))
    path = roads["factored"]["W"]
    moved = np.linalg.norm(path[:, :, -1] - path[:, :, 0], axis=(-2, -1))
    return {
        "draws": failed.size,
        "undecided": int(failed.sum()),
        **{name: _largest(values) for name, values in distances.items()},
        "moved": float(np.median(moved)),
        "most steps": int(max(road["steps"].max() for road in roads.values())),
    }


def _failed(road: dict[str, np.ndarray]) -> np.ndarray:
    return road["result"] != "horizon_reached"


def _largest(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.max(known)) if known.size else math.nan


def _notes(where: str, roads: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Which runs failed, and how (the first ten)."""
    lines = []
    for name, road in roads.items():
        for kind, draw in np.argwhere(_failed(road)):
            result = road["result"][kind, draw]
            lines.append(f"{where}, draw {draw}, {name}, {KINDS[kind]} data: {result}")
    return lines[:10] + [f"{where}: and {len(lines) - 10} more"] * (len(lines) > 10)


def _panel(
    depth: int, times: np.ndarray, found: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """The largest distances of one depth against time."""
    sets = []
    for name in found[0]:
        curves = np.concatenate([_flat(one[name], 2) for one in found])
        finite = np.isfinite(curves)
        runs = [np.max(curves, axis=0, initial=0.0, where=finite)]
        sets.append({"label": name, "x": times, "runs": runs})
    return {
        "title": f"N = {depth}",
        "xlabel": "time",
        "ylabel": "largest distance of W",
        "xscale": "linear",
        "yscale": "log",
        "sets": sets,
        "lines": [],
    }


def _flat(array: np.ndarray, axes: int) -> np.ndarray:
    """The first axes as one."""
    return array.reshape(-1, *array.shape[axes:])
