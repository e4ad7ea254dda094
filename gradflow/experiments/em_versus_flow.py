r"""Do EM, accelerated EM and gradient flow reach the same optimum of a Gaussian
latent-variable model, and how fast?

All methods descend the same energy, minus the average log-likelihood, from the same
starts; probabilistic PCA and CCA have their optimum in closed form beside them. Near an
optimum EM is linear, with a rate that is an eigenvalue of its Jacobian, and the flow's
gap falls at twice an eigenvalue of the Hessian; both are compared with what runs do.
"""

import dataclasses
import math
import time
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter
from jax.flatten_util import ravel_pytree

from ..em import (
    AlternatingMaximization,
    ExpandedMaximization,
    ExpectationMaximization,
    Squarem,
)
from ..flow import GradientFlow
from ..iterate import iterate, Iterator
from ..models.factor import LatentGaussian
from ..report import environment, Report, TRAJECTORIES
from ..solution import Solution
from ..solve import integrate, Integrator, TOLERANCE_RATIO, TSIT5
from ..solvers.chebyshev import RKC2
from ..statistics import fraction
from ..study import find_device, Outcome, precision, run_study, Study
from ..theory.factor import theory_of
from .base import LARGEST_COUNT, one_of, positive, RunConfig, whole_number
from .latent_limits import judge, Limit, limits, SAME, told_of
from .latent_problems import DATA, MODELS, Problem, problem
from .linear_rates import em_rate, flow_rate, polished, slope


CLAIM = (
    "Gradient flow, EM and accelerated EM reach the same optimum of the likelihood of "
    "probabilistic PCA, factor analysis, probabilistic CCA and inter-battery factor "
    "analysis, or differ by the kind of point they end at; near it each converges at "
    "the rate that its linearization gives."
)
SOURCE = "Dempster 1977, Tipping 1999, Bach 2005, Varadhan 2008 (with coauthors)"
COST = "one to three minutes a model on two cores"
METHODS = ("flow", "em", "expanded", "squarem", "alternating")
SCHEMES: dict[str, Any] = {
    "em": ExpectationMaximization,
    "expanded": ExpandedMaximization,
    "squarem": lambda energy: Squarem(ExpectationMaximization(energy)),
    "alternating": AlternatingMaximization,
}
# Of more coordinates no rates are computed, and flows end once they are certified.
LARGEST = 200
# Points of a curve.
CURVE_POINTS = 300
CURVE_RTOL = 1e-8
CURVE_STEPS = 5000


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one row of the table for each model and method."""

    hovers: ClassVar[bool] = False

    data: Literal["synthetic", "digits", "wine", "breast_cancer", "mnist"] = "synthetic"
    "Drawn from a true model, or real (all but MNIST's halves need scikit-learn)."
    models: tuple[str, ...] = MODELS
    "Any of ppca, fa, pcca, ibfa."
    methods: tuple[str, ...] = ("flow", "em", "squarem", "alternating")
    "Any of flow, em, expanded (PX-EM), squarem, and alternating (IBFA only)."
    variables: int = 8
    "Of the synthetic data and of MNIST, both views together."
    latents: int = 2
    "Latent variables that all variables load on."
    private: int = 1
    "Latent variables of each view (IBFA)."
    scale: float = 0.5
    "Size of the loadings of a start, in deviations of each variable."
    draws: int = 200
    "Starts per model, the same for each method."
    tolerance: float = 1e-6
    "The flow's speed to stop at."
    rtol: float | None = 1e-5
    "The flow's tolerance per step: where it goes, not each digit of its path, counts."
    step: float = 1e-9
    "The length of an iteration's step to stop at."
    max_steps: int = 20_000
    "Steps of an iteration, or of a solver before the next one takes over."

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "data", DATA)
        for name, allowed in (("models", MODELS), ("methods", METHODS)):
            wrong = [value for value in getattr(self, name) if value not in allowed]
            if wrong or not getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be some of "
                    f"{', '.join(allowed)}"
                )
        whole_number(self, "variables", least=4, most=784)
        whole_number(self, "latents", least=1, most=LARGEST_COUNT)
        whole_number(self, "private", least=1, most=LARGEST_COUNT)
        positive(self, "scale")
        positive(self, "step")
        drawn = self.data in ("synthetic", "mnist")
        if drawn and self.latents + 2 * self.private >= self.variables:
            raise ValueError(
                f"latents={self.latents} and private={self.private} are too many for "
                f"variables={self.variables}: raise variables"
            )


def run(config: Config, *, progress: bool | None = None) -> Report:
    """Runs the studies and reports one row per model and method."""
    device = find_device(config.device)
    rows, notes, panels = [], [], []
    seconds: dict[str, float] = {}
    with precision(config.dtype), jax.default_device(device):
        for model in config.models:
            posed = problem(
                model,
                config.data,
                jr.fold_in(jr.key(config.seed), MODELS.index(model)),
                variables=config.variables,
                latents=config.latents,
                private=config.private,
                scale=config.scale,
            )
            job = _Job(config, model, posed, progress)
            rows += job.rows()
            notes += job.notes()
            panels += job.panels()
            for stage, duration in job.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + duration
        return Report(
            "em_versus_flow",
            CLAIM,
            dataclasses.asdict(config),
            environment(config.dtype, device, TRAJECTORIES),
            rows,
            notes,
            {"panels": panels},
            seconds,
        )


class _Job:
    """One model: its outcomes by method, and what they come to."""

    def __init__(self, config: Config, model: str, posed: Problem, progress):
        self.config, self.model, self.posed = config, model, posed
        self.energy, self.start = posed.energy, posed.start
        self.key = jr.fold_in(jr.key(config.seed), 100 + MODELS.index(model))
        self.flow = GradientFlow(self.energy)
        self.theory = _theory(posed)
        self.closed = (
            None if self.theory is None else float(self.theory.optimal_energy())
        )
        self.large = len(ravel_pytree(self.start(self.key))[0]) > LARGEST
        methods = [m for m in config.methods if m != "alternating" or model == "ibfa"]
        self.seconds = {"studies": 0.0, "limits": 0.0, "rates": 0.0}
        self.per_run: dict[str, float] = {}
        self.outcomes: dict[str, Outcome] = {}
        for method in methods:
            began = time.perf_counter()
            # Runs of one step compile what all others need.
            self._run(method, 1, False)
            compiled = time.perf_counter()
            outcome = self._run(method, config.max_steps, progress)
            ended = time.perf_counter()
            self.per_run[method] = (ended - compiled) / config.draws
            self.seconds["studies"] += ended - began
            self.outcomes[method] = outcome
        began = time.perf_counter()
        self.limits = {
            method: limits(self.energy, outcome.solution, config.step, self.closed)
            for method, outcome in self.outcomes.items()
        }
        reached = [
            limit.energy
            for found in self.limits.values()
            for limit in found
            if limit.kind != "undecided"
        ]
        best = min(reached, default=math.inf)
        self.lowest = float(best if self.closed is None else self.closed)
        for found in self.limits.values():
            judge(found, self.lowest)
        self.seconds["limits"] += time.perf_counter() - began
        began = time.perf_counter()
        self.rates, self.curves = self._linearized()
        self.seconds["rates"] += time.perf_counter() - began

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for method, outcome in self.outcomes.items():
            solution, found = outcome.solution, self.limits[method]
            kinds = self._kinds(method)
            share = fraction(kinds == "optimum", kinds == "undecided")
            gaps = np.asarray(solution.energy) - self.lowest
            predicted, measured = self.rates.get(method, ("-", "-"))
            rows.append(
                {
                    "model": self.model,
                    "method": method,
                    "draws": share.draws,
                    "optimum": share.count,
                    "95 % low": share.low,
                    "95 % high": share.high,
                    "other minimum": int((kinds == "other minimum").sum()),
                    "other Heywood": int((kinds == "other Heywood").sum()),
                    "saddle": int((kinds == "saddle").sum()),
                    "undecided": share.undecided,
                    "Heywood": sum(bool(limit.variables) for limit in found),
                    "on the way": sum(limit.late for limit in found),
                    "apart from flow": self._apart(method),
                    "least gap": float(gaps.min()),
                    "closed form": "no" if self.closed is None else "yes",
                    "median updates": float(np.median(solution.stats["velocities"])),
                    "ms per run": 1e3 * self.per_run[method],
                    "worst increase": _worst(solution),
                    "rate": predicted,
                    "rate seen": measured,
                }
            )
        return rows

    def notes(self) -> list[str]:
        """How far the truth is, and where runs go that are not at the optimum."""
        lines = []
        if self.posed.truth is not None:
            above = float(self.energy(self.posed.truth)) - self.lowest
            lines.append(
                f"{self.model}: the true point's energy is {above:.4g} above the least"
            )
        for method, outcome in self.outcomes.items():
            told = told_of(self.limits[method], outcome.solution, self.lowest, method)
            lines += [f"{self.model} by {method}: {line}" for line in told]
        return lines

    def _apart(self, method: str) -> int | str:
        """How many draws go elsewhere than the flow, by the value of the limit."""
        flow = self.limits.get("flow")
        if flow is None or method == "flow":
            return "-"
        pairs = zip(self.limits[method], flow, strict=True)
        return sum(not abs(one.energy - other.energy) <= SAME for one, other in pairs)

    def panels(self) -> list[dict[str, Any]]:
        return self.curves

    def _kinds(self, method: str) -> np.ndarray:
        return np.array([limit.kind for limit in self.limits[method]])

    def _run(self, method: str, max_steps: int, progress: bool | None) -> Outcome:
        config = self.config
        study = Study(
            self.start,
            self._descend(method, max_steps),
            _speed,
            draws=config.draws,
            batch=config.batch,
        )
        return run_study(
            study,
            self.key,
            dtype=config.dtype,
            device=config.device,
            progress=progress,
        )

    def _descend(self, method: str, max_steps: int) -> Any:
        config = self.config
        if method == "flow":
            return Integrator(
                self.flow,
                horizon=config.horizon,
                tolerance=config.tolerance,
                rtol=config.rtol,
                # The rest of the way would take ten times as long.
                stop=self.theory.certificate if self.theory and self.large else None,
                max_steps=max_steps,
            )
        iteration = SCHEMES[method](self.energy)
        return Iterator(iteration, config.step, max_steps=max_steps)

    def _linearized(self) -> tuple[dict[str, tuple[Any, Any]], list[dict[str, Any]]]:
        """Predicted and measured rates of EM and the flow, and their curves."""
        named = [m for m in ("em", "flow") if m in self.outcomes]
        good = [np.array([_inside(limit) for limit in self.limits[m]]) for m in named]
        if not named or self.large or not np.all(good, axis=0).any():
            return {}, []
        draw = int(np.argmax(np.all(good, axis=0)))
        start = self.start(jr.fold_in(self.key, draw))
        rates: dict[str, tuple[Any, Any]] = {}
        panels = []
        for method in named:
            ended = self.outcomes[method].solution
            # Optima are many, turned into each other; rates may depend on which.
            best = jax.tree.map(lambda leaf: jnp.asarray(leaf[draw]), ended.point)
            best = polished(self.energy, best)
            least = float(self.energy(best))
            if method == "em":
                rate = em_rate(ExpectationMaximization(self.energy), best)
                count = int(ended.stats["steps"][draw])
                times = np.unique(np.round(np.linspace(0, count, CURVE_POINTS)))
                predicted = 2 * np.log(rate)
            else:
                rate = flow_rate(self.energy, best)
                times = np.linspace(0, float(ended.time[draw]), CURVE_POINTS)
                predicted = -2 * rate
            energies = self._observed(method, start, times)
            gaps = np.asarray(energies) - least
            seen, line = slope(times, gaps, predicted)
            measured = np.exp(seen / 2) if method == "em" else -seen / 2
            # A curve that stays above the window shows no rate.
            shown = float(measured) if np.isfinite(measured) else "-"
            rates[method] = (float(rate), shown)
            panels.append(_panel(self.model, method, times, gaps, line))
        return rates, panels

    def _observed(self, method: str, start: LatentGaussian, times: np.ndarray):
        at = jnp.asarray(times[1:])
        if method == "em":
            iteration = ExpectationMaximization(self.energy)
            solution = iterate(iteration, start, times=at, throw=False)
        else:
            solution = integrate(
                self.flow,
                start,
                times=at,
                tolerance=TOLERANCE_RATIO * CURVE_RTOL,
                # What is stiff from the second one on: the first would take 1e6.
                method=(TSIT5, RKC2()),
                max_steps=CURVE_STEPS,
                throw=False,
            )
        assert solution.history is not None  # because times are given
        first = np.asarray(self.energy(start))[None]
        return np.concatenate([first, np.asarray(solution.history["energy"])])


def _speed(solution: Solution) -> Any:
    return solution.speed


def _inside(limit: Limit) -> bool:
    """Whether a run came to rest at an optimum that has a rate."""
    return limit.kind == "optimum" and not (limit.variables or limit.late)


def _worst(solution: Solution) -> float | str:
    if "increase" not in solution.stats:
        return "-"
    return float(np.max(solution.stats["increase"]))


def _theory(posed: Problem) -> Any:
    if posed.energy.pattern is not None:
        return None
    try:
        return theory_of(posed.energy, posed.start(jr.key(0)))
    except ValueError:  # factor analysis, or a singular view
        return None


def _panel(model, method, times, gaps, line) -> dict[str, Any]:
    return {
        "title": f"{model} by {method}",
        "sets": [{"label": method, "x": times, "runs": [gaps]}],
        "lines": [line],
        "line": "linearization",
        "xlabel": "iterations" if method == "em" else "flow time",
        "ylabel": "energy above the least",
        "xscale": "linear",
        "yscale": "log",
    }
