r"""Phase diagrams of posterior collapse: grids of hyperparameters, and in each cell
which latents are active, by theory and at the end of a run.

A mode is in case a if its dimension of the last latent layer and the code of x are both
active, b if that dimension explains noise of $z_1$ only, c if it has collapsed. Plain
and conditional VAEs have cases a and c.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..collapse import kl, kl_hierarchical, spectra
from ..critical import classify, CriticalPoint
from ..models.cvae import ConditionalELBO, LinearCVAE
from ..models.hvae import HierarchicalELBO, LinearHVAE
from ..models.vae import LinearVAE, NegativeELBO
from ..moments import Moments
from ..theory.cvae import CVAETheory
from ..theory.hvae import HVAETheory
from ..theory.vae import VAETheory
from .base import positive


CASES = ("a", "b", "c")


class Ended(eqx.Module):
    """What is kept of a run: the verdict, and of each mode, largest first, the nats
    that the code has of x, and the divergence of the last layer's posterior from its
    prior."""

    verdict: CriticalPoint
    code: Float[Array, " modes"]
    prior: Float[Array, " modes"]


def inspect(flow, theory, solution) -> Ended:
    """The finding of a draw."""
    energy, point = flow.energy, solution.point
    if isinstance(energy, HierarchicalELBO):
        assert energy.covariance_1 is not None  # in these grids
        own = energy.covariance_1[0, 0]
        code = 0.5 * jnp.log1p(spectra(energy, point)["encoder_1"] ** 2 / own)
        prior = kl_hierarchical(energy, point)[1]
    else:
        code = prior = kl(energy, point)
    ordered = [-jnp.sort(-nats) for nats in (code, prior)]
    return Ended(classify(flow, theory, solution), *ordered)


def cases(code, prior) -> np.ndarray:
    """0, 1, 2 for a, b, c, from which modes are active in the code and in the last
    layer."""
    return np.where(prior, np.where(code, 0, 1), 2)


class AbstractGrid(abc.ABC):
    """Cells of two hyperparameters, x by y."""

    name: str
    model: str
    xlabel: str
    ylabel: str
    yscale = "log"
    x: tuple[float, ...]
    y: tuple[float, ...]

    @abc.abstractmethod
    def posed(self, x: float, y: float) -> tuple[Any, Any, Any]:
        """The energy of a cell, a point of the right shape, and its theory."""

    @abc.abstractmethod
    def predicted(self, theory: Any) -> np.ndarray:
        """The case of each mode at the minimum."""

    @abc.abstractmethod
    def thresholds(self, y: float) -> np.ndarray:
        """The x from which on each mode's last layer has collapsed."""


class PlainGrid(AbstractGrid):
    """A VAE's beta by the size of its latent space."""

    name, model = "vae", "VAE"
    xlabel, ylabel, yscale = "beta", "latents", "linear"

    def __init__(self, variances, betas, latents):
        self.moments = moments_of(variances)
        self.x, self.y = betas, tuple(latents)

    def posed(self, x, y):
        energy = NegativeELBO(self.moments, beta=float(x))
        like = LinearVAE.zeros(len(self.moments.xx), int(y), covariance="diagonal")
        return energy, like, VAETheory(energy, int(y), diagonal=True)

    def predicted(self, theory):
        active = np.asarray(theory.modes.active())
        return cases(active, active)

    def thresholds(self, y):
        theory = self.posed(1.0, y)[2]
        count = min(int(y), len(self.moments.xx))
        return np.array([theory.collapse_threshold(mode) for mode in range(count)])


class ConditionalGrid(AbstractGrid):
    """A conditional VAE's beta by the correlation of x and y (the source's Remark 1):
    $C_{yy} = \\mathrm{diag}(v)$ and $C_{xx} = 1$ with correlation rho of $x_i$ and
    $y_i$, so that Cov(y given x) has the eigenvalues $(1 - \\rho^2) v_i$."""

    name, model = "cvae", "CVAE"
    xlabel, ylabel, yscale = "beta", "correlation of x and y", "linear"

    def __init__(self, variances, betas, correlations):
        self.variances = np.asarray(variances, dtype=float)
        self.x, self.y = betas, tuple(correlations)

    def posed(self, x, y):
        size = len(self.variances)
        across = jnp.diag(jnp.asarray(y * np.sqrt(self.variances)))
        moments = Moments(
            jnp.eye(size), across, jnp.diag(jnp.asarray(self.variances)), 1
        )
        energy = ConditionalELBO(moments, beta=float(x))
        like = LinearCVAE.zeros(size, size, size, covariance="diagonal")
        return energy, like, CVAETheory(energy, size, diagonal=True)

    def predicted(self, theory):
        active = np.asarray(theory.modes.active())
        return cases(active, active)

    def thresholds(self, y):
        theory = self.posed(1.0, y)[2]
        return np.array(
            [theory.collapse_threshold(mode) for mode in range(len(self.variances))]
        )


class HierarchicalGrid(AbstractGrid):
    r"""A hierarchical VAE's $\beta_2$ by $\beta_1$, or by $\sigma_1$ at $\beta_1 = 1$;
    $\Sigma_1 = \sigma_1^2$ is fixed."""

    model, xlabel = "HVAE", "beta_2"

    def __init__(self, variances, x, y, *, by: str):
        self.moments = moments_of(variances)
        self.x, self.y, self.by = x, y, by
        self.name = "hvae" if by == "beta_1" else by
        self.ylabel = by

    def posed(self, x, y):
        size = len(self.moments.xx)
        other = {"beta_1": 1.0, "sigma_1": 1.0} | {self.by: float(y)}
        energy = HierarchicalELBO(
            self.moments,
            beta_1=other["beta_1"],
            beta_2=float(x),
            covariance_1=other["sigma_1"] ** 2 * jnp.eye(size),
        )
        like = LinearHVAE.zeros(size, size, size, covariance_2="diagonal")
        return energy, like, HVAETheory(energy, size, size)

    def predicted(self, theory):
        return cases(np.asarray(theory.ratio > 1), np.asarray(theory.omega2 > 0))

    def thresholds(self, y):
        theory = self.posed(1.0, y)[2]
        modes = range(len(self.moments.xx))
        return np.array([theory.collapse_threshold(mode) for mode in modes])


def moments_of(variances) -> Moments:
    """Of x with these variances, to be encoded and decoded."""
    xx = jnp.diag(jnp.sort(jnp.asarray(variances))[::-1])
    return Moments(xx, xx, xx, 1, autoencoding=True)


def spaced(low: float, high: float, points: int) -> tuple[float, ...]:
    """Evenly in logarithm."""
    return tuple(float(value) for value in np.geomspace(low, high, points))


def check_correlations(config: object) -> None:
    """**Raises:** `ValueError` for entries of `correlations` outside [0, 1)."""
    values = getattr(config, "correlations", ())
    for value in values:
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ValueError(f"correlations must be >= 0 and < 1, got {value!r}")
    if not values:
        raise ValueError("correlations is empty: give at least one value")


def check_range(config: object, low: str, high: str) -> None:
    """**Raises:** `ValueError` unless 0 < low < high."""
    for name in (low, high):
        positive(config, name)
    if not getattr(config, low) < getattr(config, high):
        raise ValueError(
            f"{low}={getattr(config, low)} must be below {high}={getattr(config, high)}"
        )
