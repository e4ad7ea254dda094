r"""How far from the exact flow gradient descent, minibatch SGD and Adam run, and up to
which step size gradient descent stays at a minimum.

All start from the same points of a linear VAE; step k with step size h is compared with
the flow at time kh, and the gap is the largest distance up to the horizon.

- Gradient descent is Euler's method for the flow: its gap is of first order in h.
- Minibatches add noise of variance $h^2$ per step, of which $1/h$ come per unit of
  time: order 1/2, where the noise outweighs Euler's error.
- Adam moves by about h whatever the gradient's size: it follows another flow, one of
  signs, so its gap does not vanish with h: order 0.
- Near a minimum gradient descent multiplies what is off in an eigenvector of the
  Hessian by $1 - h\lambda$: it stays for $h < 2/\lambda_{max}$.

*Reference:* Kingma, Ba, *Adam* (2015); Li, Tai, E, *Stochastic modified equations and
adaptive stochastic gradient algorithms* (2017); Cohen, Kaur, Li, Kolter, Talwalkar,
*Gradient descent on neural networks typically occurs at the edge of stability* (2021).
"""

import dataclasses
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from cyclopts import Parameter
from jax.flatten_util import ravel_pytree

from ..flow import GradientFlow
from ..initial import GaussianLike, NearPoint
from ..models.vae import LinearVAE, NegativeELBO
from ..moments import Moments
from ..report import environment, Report, TRAJECTORIES
from ..solve import integrate
from ..statistics import fraction
from ..study import find_device, precision
from ..theory.vae import VAETheory
from .base import LARGEST_COUNT, positive, RunConfig, whole_number


CLAIM = (
    "Gradient descent differs from gradient flow by a gap of first order in the step "
    "size, minibatch SGD by one of order 1/2, Adam by one that does not vanish; "
    "gradient descent stays at a minimum up to the step size 2/lambda_max and not "
    "beyond."
)
SOURCE = "Kingma 2015, Li 2017, Cohen 2021 (with coauthors)"
COST = "about half a minute on one core for the default settings"
METHODS: dict[str, Any] = {
    "gradient descent": optax.sgd,
    "SGD": optax.sgd,
    "Adam": optax.adam,
}
ORDERS = {"gradient descent": 1.0, "SGD": 0.5, "Adam": 0.0}


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one row of the table for each method, and one for each factor."""

    draws: int = 32
    "Starts, the same for all methods."
    tolerance: float = 1e-6
    "The flow's solver works at a thousandth of this."
    horizon: float = 8.0
    "Flow time up to which runs are compared."
    max_steps: int = 100_000
    "Steps of the flow's solver."
    scale: float = 0.5
    "Standard deviation of the entries of a start's maps."
    variances: tuple[float, ...] = (3.0, 1.5, 0.75, 0.375)
    "Of the normal distribution that the data are drawn from."
    samples: int = 1024
    "Rows of data."
    minibatch: int = 32
    "Rows per step of SGD, drawn with replacement."
    latents: int = 2
    "Size of the latent space."
    beta: float = 0.5
    "The ELBO's."
    coarsest: float = 0.125
    "The largest step size, in units of 2/lambda_max."
    halvings: int = 5
    "Step sizes after it, each half the one before."
    factors: tuple[float, ...] = (0.5, 0.9, 1.1, 1.5)
    "Step sizes near the minimum, in units of 2/lambda_max."
    near: float = 1e-3
    "How far from the minimum these runs start."
    updates: int = 1000
    "Steps of these runs."

    def __post_init__(self):
        super().__post_init__()
        for name in ("horizon", "scale", "variances", "beta", "factors", "near"):
            positive(self, name)
        for name in ("samples", "minibatch", "latents", "halvings", "updates"):
            whole_number(self, name, least=1, most=LARGEST_COUNT)
        positive(self, "coarsest")
        if self.coarsest >= 1:
            raise ValueError(
                f"coarsest={self.coarsest} must be below 1: from there on gradient "
                "descent leaves the minimum"
            )


def run(config: Config, *, progress: bool | None = None) -> Report:
    """Runs all methods and reports one row per method and factor."""
    del progress  # a few seconds
    device = find_device(config.device)
    began = time.perf_counter()
    with precision(config.dtype), jax.default_device(device):
        job = _Job(config)
        gaps, paths = job.gaps()
        near = {factor: job.near(factor) for factor in config.factors}
        rows = [_gap_row(method, job.shares, gap) for method, gap in gaps.items()]
        rows += [_stability_row(factor, run) for factor, run in near.items()]
        note = (
            f"lambda_max = {2 / job.limit:.4g} at the minimum, so the limit of "
            f"stability is a step size of {job.limit:.4g}"
        )
        return Report(
            "flow_versus_training",
            CLAIM,
            dataclasses.asdict(config),
            environment(config.dtype, device, TRAJECTORIES),
            rows,
            [note],
            {
                "title": "Training against gradient flow, linear VAE",
                "panels": [
                    _gap_panel(job.shares, gaps),
                    _path_panel(job, paths),
                    _near_panel(near),
                ],
            },
            {"all": time.perf_counter() - began},
        )


class _Job:
    """The problem, its minimum, and the runs of each method."""

    def __init__(self, config: Config):
        self.config = config
        data, starts, self.key, self.moved = jr.split(jr.key(config.seed), 4)
        size = len(config.variances)
        deviations = jnp.sqrt(jnp.asarray(config.variances))
        self.data = deviations[None, :] * jr.normal(data, (config.samples, size))
        # From all rows and in their order, as SGD's are from some.
        xx = self.data.T @ self.data / config.samples
        moments = Moments(xx, xx, xx, config.samples, autoencoding=True)
        self.energy = NegativeELBO(moments, beta=config.beta)
        self.theory = VAETheory(self.energy, config.latents, diagonal=True)
        like = LinearVAE.zeros(size, config.latents, covariance="diagonal")
        start = GaussianLike(like, jnp.asarray(config.scale))
        self.starts = jax.vmap(start)(jr.split(starts, config.draws))
        self.limit = 2 / largest_curvature(self.energy, self.theory.optimum())
        # Of the limit; all divide the time between two comparisons.
        self.shares = config.coarsest * 0.5 ** np.arange(config.halvings + 1)
        self.between = float(self.shares[0] * self.limit)
        self.count = max(1, int(np.ceil(config.horizon / self.between)))
        self.times = self.between * np.arange(1, self.count + 1)

    def gaps(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Of each method the gap of each start and step size, [start, size], and the
        energy above the least of the first start's path: the flow's too."""
        flow = _followed(self.energy, self.starts, jnp.asarray(self.times), self.config)
        paths = {"flow": self._above(jax.tree.map(lambda leaf: leaf[0], flow))}
        gaps = {}
        for method in METHODS:
            found = []
            for number, share in enumerate(self.shares):
                path = self._trained(method, share, 2**number)
                found.append(np.asarray(_distance(path, flow)))
                if number == 0:
                    first = jax.tree.map(lambda leaf: leaf[0], path)
                    paths[method] = self._above(first)
            gaps[method] = np.stack(found, axis=1)
        return gaps, paths

    def near(self, factor: float) -> np.ndarray:
        """Energies above the least of gradient descent from beside the minimum, [start,
        step], the start first."""
        beside = NearPoint(self.theory.optimum(), self.config.near)
        starts = jax.vmap(beside)(jr.split(self.moved, self.config.draws))
        path = _trained(
            self.energy, starts, self.key, factor * self.limit, jnp.asarray(1), None,
            method="gradient descent", count=self.config.updates, minibatch=0,
        )  # fmt: skip
        first = np.asarray(self._above(starts))
        energies = np.asarray(jax.vmap(self._above)(path))
        return np.concatenate([first[:, None], energies], axis=1)

    def _above(self, path):
        return jax.vmap(self.energy)(path) - self.theory.optimal_energy()

    def _trained(self, method: str, share: float, stride: int):
        sampled = method == "SGD"
        return _trained(
            self.energy, self.starts, self.key, share * self.limit, jnp.asarray(stride),
            self.data if sampled else None, method=method, count=self.count,
            minibatch=self.config.minibatch if sampled else 0,
        )  # fmt: skip


@eqx.filter_jit
def largest_curvature(energy, point) -> Any:
    r"""$\lambda_{max}$, the largest eigenvalue of the Hessian."""
    flat, restore = ravel_pytree(point)
    hessian = jax.hessian(lambda x: energy(restore(x)))(flat)
    return jnp.linalg.eigvalsh(hessian)[-1]


@eqx.filter_jit
def _followed(energy, starts, times, config: Config):
    """The exact flow's points at these times, [start, time]."""

    def one(start):
        solution = integrate(
            GradientFlow(energy),
            start,
            times=times,
            observe={"point": lambda point: point},
            tolerance=config.tolerance,
            rtol=config.rtol,
            max_steps=config.max_steps,
        )
        assert solution.history is not None  # because times are given
        return solution.history["point"]

    return jax.vmap(one)(starts)


@eqx.filter_jit
def _trained(
    energy, starts, key, step, stride, data, *, method: str, count: int, minibatch: int
):
    """The points of a method after each `stride` steps, [start, count]."""
    optimizer = METHODS[method](step)

    def update(_, state):
        point, memory, key = state
        key, own = jr.split(key)
        here = energy
        if data is not None:
            rows = data[jr.randint(own, (minibatch,), 0, len(data))]
            here = eqx.tree_at(
                lambda e: e.moments.xx, energy, rows.T @ rows / minibatch
            )
        # Adam raises a float to the power of a count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            change, memory = optimizer.update(jax.grad(here)(point), memory)
        return optax.apply_updates(point, change), memory, key

    def record(state, _):
        state = jax.lax.fori_loop(0, stride, update, state)
        return state, state[0]

    def one(start, key):
        state = start, optimizer.init(start), key
        return jax.lax.scan(record, state, length=count)[1]

    draws = len(jax.tree.leaves(starts)[0])
    return jax.vmap(one)(starts, jr.split(key, draws))


@eqx.filter_jit
def _distance(path, other):
    """The largest distance of two paths, over time, for each start."""
    squares = jax.tree.map(
        lambda a, b: jnp.sum((a - b) ** 2, axis=tuple(range(2, a.ndim))), path, other
    )
    return jnp.sqrt(jnp.max(sum(jax.tree.leaves(squares)), axis=1))


def _gap_row(method: str, shares: np.ndarray, gaps: np.ndarray) -> dict[str, Any]:
    middle = np.median(gaps, axis=0)
    orders = np.diff(np.log(middle)) / np.diff(np.log(shares))
    return {
        "what": method,
        "starts": len(gaps),
        "coarsest / limit": float(shares[0]),
        "median gap": float(middle[0]),
        "finest / limit": float(shares[-1]),
        "its median gap": float(middle[-1]),
        "least order": float(orders.min()),
        "largest order": float(orders.max()),
        "last order": float(orders[-1]),
        "order in theory": ORDERS[method],
        "stays": "-",
        "95 % low": "-",
        "95 % high": "-",
    }


def _stability_row(factor: float, energies: np.ndarray) -> dict[str, Any]:
    """Whether runs end closer to the minimum than they began; NaN is not."""
    energies = np.asarray(energies)
    share = fraction(energies[:, -1] < energies[:, 0])
    return {
        "what": f"gradient descent near the minimum, step size {factor:g} of the limit",
        "starts": share.draws,
        **dict.fromkeys(
            (
                "coarsest / limit", "median gap", "finest / limit", "its median gap",
                "least order", "largest order", "last order", "order in theory",
            ),
            "-",
        ),
        "stays": share.count,
        "95 % low": share.low,
        "95 % high": share.high,
    }  # fmt: skip


def _gap_panel(shares: np.ndarray, gaps: dict[str, np.ndarray]) -> dict[str, Any]:
    lines = []
    for method, found in gaps.items():
        order = ORDERS[method]
        last = np.median(found[:, -1])
        lines.append({"x": shares, "y": last * (shares / shares[-1]) ** order})
    return {
        "title": "distance from the flow",
        "sets": [
            {"label": method, "x": shares, "runs": found}
            for method, found in gaps.items()
        ],
        "points": True,
        "lines": lines,
        "line": "orders 1, 1/2, 0",
        "xlabel": r"step size / (2/$\lambda_{max}$)",
        "ylabel": "largest distance from the flow",
        "xscale": "log",
        "yscale": "log",
    }


def _path_panel(job: _Job, paths: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": f"the first start, step size {job.shares[0]:g} of the limit",
        "sets": [
            {"label": name, "x": job.times, "runs": [np.asarray(path)]}
            for name, path in paths.items()
        ],
        "lines": [],
        "xlabel": "time, or steps times step size",
        "ylabel": "energy above the least",
        "xscale": "linear",
        "yscale": "log",
    }


def _near_panel(near: dict[float, Any]) -> dict[str, Any]:
    return {
        "title": "gradient descent beside the minimum",
        "sets": [
            {
                "label": f"step size {factor:g} of the limit",
                "x": np.arange(np.shape(runs)[1]),
                "runs": np.asarray(runs)[:5],
            }
            for factor, runs in near.items()
        ],
        "lines": [],
        "xlabel": "steps",
        "ylabel": "energy above the least",
        "xscale": "log",
        "yscale": "log",
    }
