r"""Runs from the start of Remark 42, and what may push them off the saddle.

From $W_1(0) = u_1^\top$, $W_2(0) = -u_1$ an autoencoder of depth 2 and rank 1 flows to
the saddle at 0. What grows beside this flow? With $p, q$ the components of $(W_1^\top
\pm W_2) / \sqrt 2$ along $u_1$,

$$\dot p = \lambda_1 p\,(1 - w), \qquad \dot q = -\lambda_1 q\,(1 - w), \qquad
w = u_1^\top W u_1 = \tfrac12 (p^2 - q^2),$$

so $c = pq$ is conserved: half the imbalance. For $x = p^2$ it is a Riccati equation,
$\dot x = \lambda_1 (c^2 + 2x - x^2)$. From $p = \varepsilon$, $q = \sqrt 2$ the run
has learned half of its limit, $w = \frac12$, at

$$t = \frac{1}{\lambda_1} \ln \frac{\sqrt 2}{|c|} + O(\varepsilon^2) =
\frac{1}{\lambda_1} \ln \frac{1}{\varepsilon} + O(\varepsilon^2).$$

A balanced perturbation $p_j = \delta g_j$, across $u_1$, has $c = 0$ at first. Its
imbalance is shared out between the modes, $c = \delta^2 \sum_j g_j^2 I_j$ in the end
(`shares` gives $I_j$), so it takes twice as long: $\frac{2}{\lambda_1} \ln
\frac{1}{\delta}$ and a constant, while $\lambda_2 \le \lambda_1 / 2$.

Rounding of the factors is of the first kind; rounding of points of fixed rank, which
are balanced by construction, is of the second. In the eigenbasis, where the entries
that could grow are 0 exactly, neither occurs: truncation alone pushes nothing,
since Runge-Kutta steps keep the invariant plane of $u_1$.

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, Remark 42.
"""

import dataclasses
import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.integrate
from jaxtyping import Array, Float

from ..audit import Audit
from ..flow import AbstractFlow, GradientFlow
from ..manifolds.euclidean import Euclidean
from ..manifolds.fixed_rank import FixedRank
from ..models.linear import AbstractLinearNetwork, DeepLinear, SquaredLoss
from ..models.low_rank import LowRank
from ..moments import Moments
from ..solution import RESULTS
from ..solve import integrate, TOLERANCE_RATIO
from ..study import precision


# Observations per run; between them the logit of w is linear in time.
TIMES = 400
# Of the solver, in units of rounding.
LEAST_RTOL = 8.1


class SumAndDifference(AbstractLinearNetwork):
    r"""$p, q = (W_1^\top \pm W_2) / \sqrt 2$ of an autoencoder of depth 2 and rank 1,
    in the eigenbasis of its data: what grows near the saddle has coordinates of its
    own."""

    p: Float[Array, " x"]
    q: Float[Array, " x"]

    def factors(self):
        first, second = self.p + self.q, self.p - self.q
        return first[None, :] / math.sqrt(2), second[:, None] / math.sqrt(2)


class SeparatedFlow(AbstractFlow[SumAndDifference]):
    r"""The gradient flow in these coordinates, for $xx = \Lambda$.

    With $s = \|W_2\|^2$ and $r = W_1 \Lambda W_1^\top$

    $$\dot p = \Lambda p - \tfrac12 (\Lambda s + r) p - \tfrac12 (\Lambda s - r) q,
    \qquad
    \dot q = -\Lambda q - \tfrac12 (\Lambda s + r) q - \tfrac12 (\Lambda s - r) p,$$

    where $\lambda_i s - r = \sum_j \frac12 (\lambda_i - \lambda_j)(p_j^2 + q_j^2) -
    (\lambda_i + \lambda_j)\, p_j q_j$ is computed as it stands: no two large numbers
    cancel, and however small $p$ is, it keeps its relative accuracy.
    """

    energy: SquaredLoss
    manifold: Euclidean
    eigenvalues: Float[Array, " x"]

    def velocity(self, point):
        p, q, rates = point.p, point.q, self.eigenvalues
        s = 0.5 * jnp.sum((p - q) ** 2)
        r = 0.5 * jnp.sum(rates * (p + q) ** 2)
        apart = (rates[:, None] - rates[None, :]) @ (p**2 + q**2)
        across = (rates[:, None] + rates[None, :]) @ (p * q)
        plus, minus = rates * s + r, 0.5 * apart - across
        return SumAndDifference(
            rates * p - 0.5 * (plus * p + minus * q),
            -rates * q - 0.5 * (plus * q + minus * p),
        )


@dataclasses.dataclass(frozen=True)
class Series:
    """Runs of one kind: how they are computed, and from where, for each `eps`."""

    method: Literal["factors", "separated", "fixed rank"]
    basis: Literal["random", "eigenbasis"]
    perturbation: Literal["rounding", "none", "unbalanced", "balanced"]
    dtype: str
    eps: tuple[float, ...] = (0.0,)

    @property
    def label(self) -> str:
        """What tells it from the other series."""
        kind = self.basis if self.perturbation == "none" else self.perturbation
        return f"{self.method}, {self.dtype}, {kind}"

    @property
    def order(self) -> int:
        """In the perturbation, of the imbalance that it makes."""
        second = self.perturbation == "balanced" or self.method == "fixed rank"
        return 2 if second else 1

    @property
    def sizes(self) -> np.ndarray:
        """Of its perturbations; that of rounding is its unit."""
        if self.perturbation == "rounding":
            return np.array([float(np.finfo(self.dtype).eps)])
        return np.array(self.eps)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """For each draw an eigenbasis, and a direction of $(p, q)$ without $p_1$."""

    bases: np.ndarray
    across: np.ndarray

    @property
    def beside(self) -> np.ndarray:
        """Directions of $p$ alone, which are balanced beside $q_1$."""
        p = self.across[:, 0]
        return p / np.linalg.norm(p, axis=1, keepdims=True)


def draw(seed: int, draws: int, size: int) -> Drawn:
    """Eigenbases and directions, each of its own key."""
    with precision("float64"):
        bases, across = _draws(jr.key(seed), jnp.arange(draws), size)
        return Drawn(np.asarray(bases), np.asarray(across))


@eqx.filter_jit
def _draws(key, draws, size):
    def one(i):
        mine = jr.fold_in(key, i)
        across = jr.normal(jr.fold_in(mine, 1), (2, size)).at[0, 0].set(0.0)
        return jr.orthogonal(mine, size), across / jnp.linalg.norm(across)

    return jax.vmap(one)(draws)


def shares(eigenvalues: tuple[float, ...]) -> np.ndarray:
    r"""$I_j$ for $j \ge 2$: what $p_j(0) = 1$ makes of $p_1 q_1$ in the end, from the
    linearized flow of $p_j, q_j$ and the conserved $\sum_j p_j q_j = 0$."""
    leading, rest = eigenvalues[0], np.array(eigenvalues[1:])

    def velocity(t, state):
        # In units of e^(lambda_j t), as p_j grows.
        p, q, _ = state.reshape(3, -1)
        size = 0.5 / (1 - 0.5 * math.exp(-2 * leading * t))  # of alpha_1^2
        plus, minus = 0.5 * (rest + leading) * size, 0.5 * (leading - rest) * size
        fading = math.exp(-2 * leading * t)
        made = minus * (p**2 + q**2) - size * (leading + rest) * p * q
        return np.concatenate(
            [
                fading * (minus * q - plus * p),
                fading * (minus * p - plus * q) - 2 * rest * q,
                -np.exp(-2 * (leading - rest) * t) * made,
            ]
        )

    start = np.concatenate([np.ones(rest.size), np.zeros(2 * rest.size)])
    until = 20 / (leading - rest[0])
    solution = scipy.integrate.solve_ivp(
        velocity, (0, until), start, rtol=1e-10, atol=1e-12
    )
    return solution.y[-rest.size :, -1]


def predictions(
    series: Series, eigenvalues: tuple[float, ...], drawn: Drawn
) -> np.ndarray:
    """Escape times in theory; axes: eps, draw. For rounding, as if it were a
    perturbation of its unit, with no constant."""
    shape, rate = (len(series.sizes), len(drawn.bases)), eigenvalues[0]
    if series.perturbation == "none":
        return np.full(shape, math.inf)
    logs = np.broadcast_to(np.log(1 / series.sizes)[:, None], shape)
    delay = 0.0
    if series.perturbation == "balanced":
        made = drawn.beside[:, 1:] ** 2 @ shares(eigenvalues)
        delay = np.log(math.sqrt(2) / np.abs(made))
    return (series.order * logs + delay) / rate


def measure(
    alike: list[Series],
    eigenvalues: tuple[float, ...],
    drawn: Drawn,
    times: np.ndarray,
    *,
    rtol: float,
    max_steps: int,
) -> list[dict[str, np.ndarray]]:
    r"""What is seen of several series of one method and dtype: $w$ and $\|W\|$ at all
    times, whether the run finished, and when it broke an invariant. Axes: eps, draw,
    time."""
    dtype = np.dtype(alike[0].dtype)
    starts = [_start(one, eps, drawn) for one in alike for eps in one.eps]
    bases, points = (np.stack(part) for part in zip(*starts, strict=True))
    seen = _runs(
        alike[0].method,
        jnp.asarray(np.array(eigenvalues), dtype),
        jnp.asarray(bases, dtype),
        jnp.asarray(points, dtype),
        jnp.asarray(times, dtype),
        max(rtol, LEAST_RTOL * float(np.finfo(dtype).eps)),
        jnp.asarray(max_steps),
    )
    ends = np.cumsum([len(one.eps) for one in alike])
    return [
        {k: np.asarray(v, float)[end - len(one.eps) : end] for k, v in seen.items()}
        for one, end in zip(alike, ends, strict=True)
    ]


def crossing(times: np.ndarray, w: np.ndarray) -> float:
    """When w first reached one half; NaN if it never did."""
    beyond = np.flatnonzero(w >= 0.5)
    if beyond.size == 0 or beyond[0] == 0:
        return math.nan
    i = beyond[0]
    before, after = w[i - 1], w[i]
    if 0 < before and after < 1:
        before, after = (math.log(v / (1 - v)) for v in (before, after))
    else:
        before, after = before - 0.5, after - 0.5
    share = -before / (after - before)
    return float(times[i - 1] + share * (times[i] - times[i - 1]))


def _start(series: Series, eps: float, drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """The eigenbases and $(p, q)$ of all draws."""
    bases, point = drawn.bases, np.zeros_like(drawn.across)
    if series.basis == "eigenbasis":
        bases = np.broadcast_to(np.eye(bases.shape[-1]), bases.shape)
    if series.perturbation == "unbalanced":
        # As large across what grows as along it.
        point = eps * drawn.across
        point[:, 0, 0] = eps
    elif series.perturbation == "balanced":
        point[:, 0] = eps * drawn.beside
    point[:, 1, 0] += math.sqrt(2)
    return bases, point


@eqx.filter_jit
def _runs(method, eigenvalues, bases, points, times, rtol, max_steps):
    def one(basis, point):
        xx = (basis * eigenvalues[None, :]) @ basis.T
        energy = SquaredLoss(Moments(xx, xx, xx, 1, autoencoding=True))
        flow, start, audit = _road(method, energy, eigenvalues, basis, point)
        leading = basis[:, 0]
        solution = integrate(
            flow,
            start,
            times=times,
            observe={
                "w": lambda p: leading @ p.matrix() @ leading,
                "size": lambda p: jnp.linalg.norm(p.matrix()),
            },
            rtol=rtol,
            tolerance=TOLERANCE_RATIO * rtol,
            max_steps=max_steps,
            audit=audit,
            throw=False,
        )
        assert solution.history is not None  # because times are given
        broken = solution.broken or {"none": jnp.full_like(times[0], jnp.inf)}
        return {
            **solution.history,
            "finished": solution.result == RESULTS.horizon_reached,
            "broken": jnp.min(jnp.stack(list(broken.values()))),
        }

    return jax.vmap(jax.vmap(one))(bases, points)


def _road(method, energy, eigenvalues, basis, point) -> tuple[Any, Any, Any]:
    """The flow, the start and the audit of one way to compute."""
    p, q = point
    if method == "separated":
        flow = SeparatedFlow(energy, Euclidean(), eigenvalues)
        return flow, SumAndDifference(p, q), None
    first, second = basis @ (p + q) / math.sqrt(2), basis @ (p - q) / math.sqrt(2)
    if method == "factors":
        network = DeepLinear((first[None, :], second[:, None]))
        return GradientFlow(energy), network, Audit
    sizes = jnp.linalg.norm(first), jnp.linalg.norm(second)
    start = LowRank(
        (second / sizes[1])[:, None],
        jnp.log(sizes[0] * sizes[1])[None],
        (first / sizes[0])[:, None],
    )
    return GradientFlow(energy, FixedRank(1, 2)), start, None
