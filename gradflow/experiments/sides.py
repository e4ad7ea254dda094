r"""Linear VAEs on both sides of thresholds of collapse, by exact flow and by Adam.

Beside each threshold, below and above, the exact flow of the exact ELBO and Adam on the
same energy start at the same point. What is asked of their ends: how many latents are
active, and how far spectra are from the closed form (D_MA).
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from cyclopts import Parameter

from ..collapse import spectra, spectral_distance
from ..critical import classify, KIND
from ..flow import GradientFlow
from ..initial import GaussianLike
from ..solve import integrate
from ..types import names_of
from .base import LARGEST_COUNT, positive, RunConfig, whole_number


# A latent is active above this many nats (see `posterior_collapse`).
CUT = 1e-3
# Of a curve in the figure, and the earliest time of one.
POINTS, EARLIEST = 60, 0.1
METHODS = ("flow", "Adam")
# RKC2, which takes over, comes to rest however coarse its steps are.
RTOL = 1e-6


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class SidesConfig(RunConfig):
    """Settings: one row of the table for each side of each threshold."""

    draws: int = 1
    "Starts per side, the same for both methods."
    batch: int = 1
    "Without effect: runs are one after the other."
    tolerance: float = 1e-7
    "The flow's stopping speed: latents near a threshold come and go slowly."
    rtol: float | None = None
    "The flow's tolerance per step, relative to the size of the point; 1e-6 by default."
    max_steps: int = 100_000
    "Steps per solver before the next one takes over."
    latents: int = 64
    "Size of each latent space."
    modes: int = 80
    "Leading principal directions that are kept of what is decoded."
    marks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    "Modes whose thresholds are looked at; 1 is the largest."
    apart: float = 0.1
    "Distance of a side from its threshold, unless another threshold is nearer."
    scale: float = 0.1
    "Standard deviation of the entries of a start's maps."
    watched: float = 3e3
    "Flow time up to which the figure follows runs; they go on to rest."
    updates: int = 4000
    "Steps of Adam."
    learning_rate: float = 0.02
    "Adam's first; it goes to 0 like a cosine."

    def __post_init__(self):
        super().__post_init__()
        for name in ("apart", "scale", "watched", "learning_rate"):
            positive(self, name)
        for name in ("latents", "modes", "marks", "updates"):
            whole_number(self, name, least=1, most=LARGEST_COUNT)
        if max(self.marks) > self.latents:
            raise ValueError(
                f"marks has {max(self.marks)}, but there are {self.latents} latents: "
                "ask for modes that a latent can learn"
            )
        if self.latents > self.modes:
            raise ValueError(
                f"latents={self.latents} is more than modes={self.modes}: keep at "
                "least as many directions of the data"
            )


class Place(NamedTuple):
    """A value of the hyperparameter, and what is said to happen there."""

    what: str
    value: float


class AbstractProblem(abc.ABC):
    """A family of energies with one hyperparameter.

    - `name`: of the hyperparameter; `thresholds`: its values where a latent collapses,
      all different.
    """

    name: str
    like: Any
    thresholds: np.ndarray

    @abc.abstractmethod
    def posed(self, value: float) -> tuple[Any, Any]:
        """The energy and its theory."""

    @abc.abstractmethod
    def places(self) -> list[Place]:
        """Where to look at both sides."""

    @abc.abstractmethod
    def wanted(self, theory: Any) -> Any:
        """The nats of each latent at the minimum, largest first."""

    @staticmethod
    @abc.abstractmethod
    def nats(energy: Any, point: Any) -> Any:
        """The same at a point."""


class Ended(NamedTuple):
    """Of a run: the nats of its latents, how far it is from the closed form and above
    the least energy, the curve of that distance, and the verdict (of a flow)."""

    nats: np.ndarray
    distance: float
    above: float
    curve: np.ndarray
    verdict: Any = None

    @property
    def active(self) -> int:
        return int((self.nats > CUT).sum())

    @property
    def certified(self) -> bool:
        """Of a flow: that it goes to a global minimum."""
        return names_of(KIND, self.verdict.kind)[()] == "global_minimum"


class Side(NamedTuple):
    """One side of a place: what theory says, and the draws of each method."""

    place: Place
    side: str
    value: float
    active: int
    ends: dict[str, list[Ended]]

    def row(self, name: str) -> dict[str, Any]:
        flow, adam = (self.ends[method] for method in METHODS)
        return {
            "at": self.place.what,
            "its value": self.place.value,
            "side": self.side,
            name: self.value,
            "active in theory": self.active,
            "draws": len(flow),
            "flow: certified": sum(end.certified for end in flow),
            "flow: right": self.right("flow"),
            "flow: active": _span([end.active for end in flow]),
            "flow: D_MA": max(end.distance for end in flow),
            "Adam: right": self.right("Adam"),
            "Adam: active": _span([end.active for end in adam]),
            "Adam: D_MA": max(end.distance for end in adam),
            "Adam: above least": max(end.above for end in adam),
        }

    def right(self, method: str) -> int:
        return sum(end.active == self.active for end in self.ends[method])


def beside(value: float, others: np.ndarray, apart: float) -> tuple[float, float]:
    """Below and above a value: by a factor 1 + apart, or half way in logarithm to the
    next of the others, if that is nearer."""
    others = np.asarray(others)
    below = others[others < value * (1 - 1e-9)]
    above = others[others > value * (1 + 1e-9)]
    low = np.sqrt(value * below.max(initial=0.0))
    high = np.sqrt(value * above.min(initial=np.inf))
    return (
        float(max(low, value / (1 + apart))),
        float(min(high, value * (1 + apart))),
    )


def side_of(config: SidesConfig, problem: AbstractProblem, place, side, value) -> Side:
    energy, theory = problem.posed(value)
    wanted = np.asarray(problem.wanted(theory))
    init = GaussianLike(problem.like, jnp.asarray(config.scale))
    ends: dict[str, list[Ended]] = {method: [] for method in METHODS}
    for draw in range(config.draws):
        # The same starts on all sides: what differs is the hyperparameter only.
        start = init(jr.fold_in(jr.key(config.seed), draw))
        ends["flow"].append(flowed(problem, energy, theory, start, config))
        ends["Adam"].append(trained(problem, energy, theory, start, config))
    return Side(place, side, value, int((wanted > 0).sum()), ends)


def distance(energy: Any, theory: Any, point: Any) -> Any:
    """The largest D_MA over the spectra that the closed form has."""
    found = spectra(energy, point)
    each = [
        spectral_distance(found[name], wanted)
        for name, wanted in theory.spectra().items()
    ]
    return jnp.max(jnp.stack(each))


def flowed(problem: Any, energy: Any, theory: Any, start: Any, config: Any) -> Ended:
    """The exact flow to rest, with its curve at `flow_times`."""
    times = jnp.asarray(flow_times(config))
    return _ended(*_flowed(problem.nats, energy, theory, start, times, config))


def trained(problem: Any, energy: Any, theory: Any, start: Any, config: Any) -> Ended:
    """Adam, with its curve at `updates_seen`."""
    found = _trained(
        problem.nats, energy, theory, start, config.learning_rate, config.updates
    )
    return _ended(*found, None)


def flow_times(config: Any) -> np.ndarray:
    return np.geomspace(EARLIEST, max(config.watched, 2 * EARLIEST), POINTS)


def updates_seen(updates: int) -> np.ndarray:
    """After how many steps Adam's curve is drawn; the last is after all."""
    return np.unique(np.geomspace(1, updates, POINTS).round().astype(int))


def _ended(nats, far, above, curve, verdict) -> Ended:
    return Ended(np.asarray(nats), float(far), float(above), np.asarray(curve), verdict)


@eqx.filter_jit
def _flowed(nats, energy, theory, start, times, config):
    flow = GradientFlow(energy)
    options = {
        "method": "auto",
        "tolerance": config.tolerance,
        "rtol": config.rtol or RTOL,
        "max_steps": config.max_steps,
        "throw": False,
    }
    observe = {"distance": lambda point: distance(energy, theory, point)}
    seen = integrate(flow, start, times=times, observe=observe, **options)
    assert seen.history is not None  # because times are given
    end = integrate(flow, seen.point, **options)
    return (
        nats(energy, end.point),
        distance(energy, theory, end.point),
        end.energy - theory.optimal_energy(),
        seen.history["distance"],
        # Of the point: where the run came from is another matter.
        classify(flow, theory, end),
    )


@eqx.filter_jit
def _trained(nats, energy, theory, start, rate, updates: int):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, updates))

    def update(_, state):
        point, memory = state
        # Adam raises a float to the power of a count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            change, memory = optimizer.update(jax.grad(energy)(point), memory)
        return optax.apply_updates(point, change), memory

    def record(state, many):
        state = jax.lax.fori_loop(0, many, update, state)
        return state, distance(energy, theory, state[0])

    steps = jnp.asarray(np.diff(updates_seen(updates), prepend=0))
    state = start, optimizer.init(start)
    (point, _), curve = jax.lax.scan(record, state, steps)
    return (
        nats(energy, point),
        distance(energy, theory, point),
        energy(point) - theory.optimal_energy(),
        curve,
    )


def _span(counts: list[int]) -> Any:
    low, high = min(counts), max(counts)
    return low if low == high else f"{low} to {high}"
