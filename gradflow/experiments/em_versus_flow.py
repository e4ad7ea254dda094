r"""Do EM, accelerated EM and gradient flow reach the same optimum of a Gaussian
latent-variable model, and how fast?

All methods descend the same energy, minus the average log-likelihood, from the same
starts; probabilistic PCA and CCA have their optimum in closed form beside them. Near an
optimum EM is linear, with a rate that is an eigenvalue of its Jacobian, and the flow's
gap falls at twice an eigenvalue of the Hessian; both are compared with what runs do.
"""

import dataclasses
import time
from typing import Any, Literal

import equinox as eqx
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
from ..solution import RESULTS, Solution
from ..solve import integrate, Integrator
from ..statistics import fraction
from ..study import find_device, Outcome, precision, run_study, Study
from ..theory.factor import theory_of
from ..types import names_of
from .base import LARGEST_COUNT, one_of, positive, RunConfig, whole_number
from .latent_problems import DATA, MODELS, Problem, problem
from .linear_rates import em_rate, FLAT, flow_rate, polished, slope


CLAIM = (
    "Gradient flow, EM and accelerated EM reach the same optimum of the likelihood of "
    "probabilistic PCA, factor analysis, probabilistic CCA and inter-battery factor "
    "analysis, or differ by the kind of point they end at; near it each converges at "
    "the rate that its linearization gives."
)
SOURCE = "Dempster 1977, Tipping 1999, Bach 2005, Varadhan 2008 (with coauthors)"
COST = "about a minute on one core for the default settings, mostly compilation"
METHODS = ("flow", "em", "expanded", "squarem", "alternating")
SCHEMES: dict[str, Any] = {
    "em": ExpectationMaximization,
    "expanded": ExpandedMaximization,
    "squarem": lambda energy: Squarem(ExpectationMaximization(energy)),
    "alternating": AlternatingMaximization,
}
# Average log-likelihoods closer than this are the same.
SAME = 1e-8
# Noise below this many floors counts as a Heywood case: the flow has no floor.
NEAR_FLOOR = 10
# Above this many coordinates no Hessian is formed.
LARGEST_HESSIAN = 200
# Points of a curve.
CURVE_POINTS = 300


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one row of the table for each model and method."""

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
    tolerance: float = 1e-7
    "The flow's speed to stop at; the solver works at a thousandth."
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


class End(eqx.Module):
    """What a run's end is: the least eigenvalue of the Hessian there over the largest
    (NaN where it is too large), and whether some noise is at its floor."""

    curvature: Any
    heywood: Any


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
        methods = [m for m in config.methods if m != "alternating" or model == "ibfa"]
        self.seconds = {"studies": 0.0, "rates": 0.0}
        self.per_run: dict[str, float] = {}
        self.outcomes: dict[str, Outcome] = {}
        for method in methods:
            began = time.perf_counter()
            study = Study(
                self.start,
                self._descend(method),
                _speed,
                draws=config.draws,
                batch=config.batch,
            )
            options = {
                "dtype": config.dtype,
                "device": config.device,
                "progress": progress,
            }
            outcome = run_study(study, self.key, **options)
            found = _ends(self.energy, outcome.solution.point)
            self.outcomes[method] = eqx.tree_at(
                lambda o: o.finding, outcome, jax.device_get(found)
            )
            # Once more, compiled.
            again = time.perf_counter()
            run_study(study, self.key, **options)
            ended = time.perf_counter()
            self.per_run[method] = (ended - again) / config.draws
            self.seconds["studies"] += ended - began
        self.closed = _closed_form(posed)
        reached = [
            np.min(found.solution.energy, initial=np.inf, where=_sound(found))
            for found in self.outcomes.values()
        ]
        self.lowest = float(min(reached) if self.closed is None else self.closed)
        began = time.perf_counter()
        self.rates, self.curves = self._linearized()
        self.seconds["rates"] += time.perf_counter() - began

    def rows(self) -> list[dict[str, Any]]:
        flow = self.outcomes.get("flow")
        rows = []
        for method, outcome in self.outcomes.items():
            solution, kinds = outcome.solution, self._kinds(outcome)
            share = fraction(kinds == "optimum", kinds == "undecided")
            gaps = np.asarray(solution.energy) - self.lowest
            apart = "-"
            if flow is not None and method != "flow":
                off = np.abs(solution.energy - flow.solution.energy)
                apart = int(np.sum(~(off <= SAME)))
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
                    "saddle": int((kinds == "saddle").sum()),
                    "undecided": share.undecided,
                    "Heywood": int(outcome.finding.heywood.sum()),
                    "apart from flow": apart,
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
        """How far the truth is, and what each end that is no optimum is."""
        lines = []
        if self.posed.truth is not None:
            above = float(self.energy(self.posed.truth)) - self.lowest
            lines.append(
                f"{self.model}: the true point's energy is {above:.4g} above the least"
            )
        for method, outcome in self.outcomes.items():
            kinds = self._kinds(outcome)
            others = np.flatnonzero(kinds != "optimum")
            for i in others[:5]:
                end = names_of(RESULTS, outcome.solution.result)[i]
                lines.append(
                    f"{self.model} by {method}, draw {i}: {kinds[i]} "
                    f"{float(outcome.solution.energy[i]) - self.lowest:.3g} above the "
                    f"least ({end}, least curvature over largest "
                    f"{float(outcome.finding.curvature[i]):.2g}"
                    + (", Heywood case)" if outcome.finding.heywood[i] else ")")
                )
            if others.size > 5:
                lines.append(f"{self.model} by {method}: and {others.size - 5} more")
        return lines

    def panels(self) -> list[dict[str, Any]]:
        return self.curves

    def _kinds(self, outcome: Outcome) -> np.ndarray:
        gap = np.asarray(outcome.solution.energy) - self.lowest
        curvature = np.asarray(outcome.finding.curvature)
        kinds = np.where(curvature < -FLAT, "saddle", "other minimum")
        kinds = np.where(np.isnan(curvature), "undecided", kinds)
        kinds = np.where(_sound(outcome), kinds, "undecided")
        # By value, however slowly the rest of the way would be.
        return np.where(np.abs(gap) <= SAME, "optimum", kinds)

    def _descend(self, method: str) -> Any:
        config = self.config
        if method == "flow":
            return Integrator(
                self.flow,
                horizon=config.horizon,
                tolerance=config.tolerance,
                rtol=config.rtol,
                max_steps=config.max_steps,
            )
        iteration = SCHEMES[method](self.energy)
        return Iterator(iteration, config.step, max_steps=config.max_steps)

    def _linearized(self) -> tuple[dict[str, tuple[Any, Any]], list[dict[str, Any]]]:
        """Predicted and measured rates of EM and the flow, and their curves."""
        named = [m for m in ("em", "flow") if m in self.outcomes]
        good = [self._kinds(self.outcomes[m]) == "optimum" for m in named]
        size = len(ravel_pytree(self.start(self.key))[0])
        if not named or size > LARGEST_HESSIAN or not np.all(good, axis=0).any():
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
            rates[method] = (float(rate), float(measured))
            panels.append(_panel(self.model, method, times, gaps, line))
        return rates, panels

    def _observed(self, method: str, start: LatentGaussian, times: np.ndarray):
        config, at = self.config, jnp.asarray(times[1:])
        if method == "em":
            iteration = ExpectationMaximization(self.energy)
            solution = iterate(iteration, start, times=at, throw=False)
        else:
            solution = integrate(
                self.flow,
                start,
                times=at,
                tolerance=config.tolerance,
                max_steps=10**6,
                throw=False,
            )
        assert solution.history is not None  # because times are given
        first = np.asarray(self.energy(start))[None]
        return np.concatenate([first, np.asarray(solution.history["energy"])])


@eqx.filter_jit
def _ends(energy, points) -> End:
    """Of all runs of one method, with a leading axis."""
    scales = jnp.diagonal(energy.covariance)

    def one(point):
        flat, restore = ravel_pytree(point)
        curvature = jnp.full((), jnp.nan, flat.dtype)
        if flat.size <= LARGEST_HESSIAN:
            hessian = jax.hessian(lambda x: energy(restore(x)))(flat)
            values = jnp.linalg.eigvalsh(hessian)
            curvature = values[0] / jnp.maximum(values[-1], 1)
        near = point.noise.floored(scales, NEAR_FLOOR * energy.floor)
        return End(curvature, jnp.any(near))

    return jax.lax.map(one, points)


def _speed(solution: Solution) -> Any:
    return solution.speed


def _sound(outcome: Outcome) -> np.ndarray:
    return np.asarray(outcome.solution.result == RESULTS.successful)


def _worst(solution: Solution) -> float | str:
    if "increase" not in solution.stats:
        return "-"
    return float(np.max(solution.stats["increase"]))


def _closed_form(posed: Problem) -> float | None:
    if posed.energy.pattern is not None:
        return None
    try:
        theory = theory_of(posed.energy, posed.start(jr.key(0)))
    except ValueError:  # factor analysis, or a singular view
        return None
    return float(theory.optimal_energy())


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
