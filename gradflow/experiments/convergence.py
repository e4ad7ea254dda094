"""Where do Gaussian starts of deep linear networks end?

*Claim under test:* for almost every start the gradient flow of a deep linear network
converges to a global minimum (depth 2), or to a global minimum of the loss on matrices
of some rank (deeper). *Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020,
Theorems 39 and 40.
"""

import dataclasses
import itertools
import time
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter

from .. import datasets
from ..critical import classify, KIND, RULE
from ..flow import GradientFlow
from ..initial import GaussianInit, OrthogonalInit, section7_widths
from ..models.linear import SquaredLoss
from ..moments import Moments
from ..report import environment, Report, VERDICTS
from ..solve import AUTO, integrate, Integrator, TOLERANCE_RATIO
from ..store.folder import slug_of, Store
from ..study import (
    find_device,
    Outcome,
    precision,
    run_studies,
    Study,
    without_points,
)
from ..theory.linear import LinearTheory, TIE
from ..types import Key, names_of
from . import verdicts
from .base import LARGEST_COUNT, one_of, positive, RunConfig, whole_number
from .verdicts import tally


CLAIM = (
    "Gradient flow of a deep linear network from almost every start ends at a global "
    "minimum of the loss (Bah et al. 2020, Theorems 39 and 40)."
)
SOURCE = "Bah et al. 2020, Theorems 39 and 40"
COST = "about 20 s on two cores for the default settings"
# Times at which the drawn runs are observed.
CURVE_POINTS = 120


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one row of the table for each depth and scale."""

    data: Literal["mnist", "mnist-quadrant", "gaussian", "teacher"] = "mnist"
    "Real digits (autoencoding, or three quadrants from one), or generated data."
    digit: int | None = None
    "One digit class of MNIST; by default all."
    dimension: int = 16
    "Leading principal directions of x kept."
    rank: int = 4
    "Width of the narrowest layer."
    depths: tuple[int, ...] = (2, 3)
    "Numbers of factors."
    start: Literal["gaussian", "orthogonal"] = "gaussian"
    "Independent entries, or orthonormal rows or columns."
    scales: tuple[float, ...] = (0.3, 0.03)
    "Standard deviation of each entry of a Gaussian start, or size of an orthogonal."
    method: Literal["auto", "tsit5"] = "auto"
    "Tsit5, then RKC2 where runs are stiff; or Tsit5 alone, half as long to compile."
    curves: int = 4
    "Runs per row whose loss is drawn."

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "data", ("mnist", "mnist-quadrant", "gaussian", "teacher"))
        one_of(self, "start", ("gaussian", "orthogonal"))
        one_of(self, "method", ("auto", "tsit5"))
        for name in ("dimension", "rank", "depths"):
            whole_number(self, name, least=1, most=LARGEST_COUNT)
        whole_number(self, "curves", least=0, most=LARGEST_COUNT)
        positive(self, "scales")
        if self.digit is not None:
            whole_number(self, "digit", least=0, most=9)
            if not self.data.startswith("mnist"):
                raise ValueError(
                    f"digit={self.digit} is for MNIST: leave it out with "
                    f"data={self.data}"
                )
        if self.rank > self.dimension:
            raise ValueError(
                f"rank={self.rank} is larger than min(widths)={self.dimension}: raise "
                "dimension or lower rank"
            )
        if 1 in self.depths and self.rank < self.dimension:
            raise ValueError(
                f"depths has 1, a network without a layer of width rank={self.rank}: "
                f"take depths >= 2, or rank={self.dimension}"
            )


def studies(config: Config) -> dict[str, tuple[Study, Key]]:
    """One study for each row, with its key."""
    with precision(config.dtype), jax.default_device(find_device(config.device)):
        return _studies(config, _theory(config))


def run(
    config: Config, *, progress: bool | None = None, store: Store | None = None
) -> Report:
    """Runs the studies and reports one row per depth and scale."""
    device = find_device(config.device)
    with precision(config.dtype), jax.default_device(device):
        theory = _theory(config)
        asked = _studies(config, theory)
        outcomes = run_studies(
            asked,
            dtype=config.dtype,
            device=config.device,
            progress=progress,
            store=store,
            keep=without_points if store is None else verdicts.counts_only,
        )
        rows, notes, panels = [], [], []
        seconds = verdicts.seconds_of(outcomes.values())
        for (depth, scale), (name, (study, key)) in zip(
            _grid(config), asked.items(), strict=True
        ):
            outcome = outcomes[name]
            rows.append(_row(study, scale, outcome))
            where = f"depth {depth}, scale {scale:g}"
            found = None
            if store is not None:
                found = verdicts.of_draw(store.cells[slug_of(name)])
            notes += verdicts.notes(where, outcome, found)
            began = time.perf_counter()
            panels.append(_panel(config, theory, study, key, outcome))
            drawing = time.perf_counter() - began
            seconds["curves"] = seconds.get("curves", 0.0) + drawing
        return Report(
            "convergence",
            CLAIM,
            dataclasses.asdict(config),
            environment(config.dtype, device, VERDICTS),
            rows,
            notes,
            {"panels": panels},
            seconds,
        )


def _grid(config: Config) -> list[tuple[int, float]]:
    return list(itertools.product(config.depths, config.scales))


def _theory(config: Config) -> LinearTheory:
    return LinearTheory(SquaredLoss(_moments(config)), config.rank)


def _studies(config: Config, theory: LinearTheory) -> dict[str, tuple[Study, Key]]:
    return {
        f"{number} depth {depth}, scale {scale:g}": (
            _study(config, theory, depth, scale),
            jr.fold_in(jr.key(config.seed), number),
        )
        for number, (depth, scale) in enumerate(_grid(config))
    }


def _moments(config: Config) -> Moments:
    key = jr.fold_in(jr.key(config.seed), -1 % 2**31)
    match config.data:
        case "mnist":
            data = datasets.mnist(config.digit)
        case "mnist-quadrant":
            data = datasets.mnist(config.digit, task="quadrant")
        case "gaussian":
            data = datasets.gaussian(key, config.dimension, 3 * config.dimension)
        case _:
            size = config.dimension
            data = datasets.teacher(key, size, size, config.rank, 3 * size)
    return data.restrict(config.dimension)


def _study(config: Config, theory: LinearTheory, depth: int, scale: float):
    widths = section7_widths(config.dimension, depth, config.rank)
    widths = (*widths[:-1], theory.energy.moments.yy.shape[0])
    start = GaussianInit if config.start == "gaussian" else OrthogonalInit
    flow = GradientFlow(theory.energy)
    integrator = Integrator(
        flow,
        horizon=config.horizon,
        tolerance=config.tolerance,
        rtol=config.rtol,
        stop=theory.certificate,
        method=AUTO if config.method == AUTO else diffrax.Tsit5(),
        max_steps=config.max_steps,
    )
    return Study(
        start(widths, jnp.asarray(scale)),
        integrator,
        eqx.Partial(classify, flow, theory),
        draws=config.draws,
        batch=config.batch,
    )


def _row(study: Study, scale: float, outcome: Outcome) -> dict[str, Any]:
    rules = names_of(RULE, outcome.finding.rule)
    widths = study.initialize.widths
    return {
        "depth": len(widths) - 1,
        "widths": "-".join(map(str, widths)),
        "scale": scale,
        **tally(names_of(KIND, outcome.finding.kind)),
        "by certificate": int((rules == "loss_certificate").sum()),
        "median time": float(np.median(outcome.solution.time)),
        "median steps": float(np.median(outcome.solution.stats["steps"])),
    }


def _panel(
    config: Config, theory: LinearTheory, study: Study, key: Key, outcome: Outcome
) -> dict[str, Any]:
    """The loss of the first few runs against time, to somewhat past their verdicts."""
    start = study.initialize
    title = f"depth {len(start.widths) - 1}, scale {float(start.scale):g}"
    ends = outcome.solution.time[: config.curves]
    ends = ends[np.isfinite(ends) & (ends > 0)]
    if len(ends) == 0:
        return {"title": title, "times": [], "energies": [], "lines": []}
    latest = min(3 * float(ends.max()), config.horizon)
    times = np.geomspace(1e-3 * latest, latest, CURVE_POINTS)
    points = _starts(start, key, jnp.arange(min(config.curves, config.draws)))
    rtol = config.rtol or config.tolerance / TOLERANCE_RATIO
    energies = np.asarray(_losses(GradientFlow(theory.energy), points, times, rtol))
    optimal = float(theory.optimal_energy())
    highest = np.max(energies, initial=-np.inf, where=np.isfinite(energies))
    return {
        "title": title,
        "times": times,
        "energies": energies - optimal,
        "lines": _lines(theory, float(highest), optimal),
    }


@eqx.filter_jit
def _starts(start, key, draws):
    return jax.vmap(lambda draw: start(jr.fold_in(key, draw)))(draws)


@eqx.filter_jit
def _losses(flow, points, times, rtol):
    def one(point):
        solution = integrate(
            flow, point, times=times, tolerance=1e3 * rtol, max_steps=10**5, throw=False
        )
        assert solution.history is not None  # because times are given
        return solution.history["energy"]

    return jax.vmap(one)(points)


def _lines(theory: LinearTheory, highest: float, optimal: float) -> list[float]:
    """The greedy chain of critical values above the least: modes learned in order of
    strength, where saddle-to-saddle runs pause."""
    chain = [float(theory.critical_energy(range(k))) for k in range(theory.rank)]
    # Modes without strength give the least value again.
    least = optimal + TIE * (chain[0] - optimal)
    return [value - optimal for value in chain if least < value <= 1.05 * highest]
