r"""Linear hierarchical VAEs: the minimum of the exact ELBO, and when $z_2$ collapses.

| on paper | in code |
|---|---|
| $A = P \Theta^2 P^\top$, $\theta_i$ | `moments.xx`, `spectrum()` |
| $m_i$, eigenvalues of $M = V_1 V_1^\top + \Sigma_1$ | `second` |
| $c_i$, of $\Sigma_1^{-1/2} M \Sigma_1^{-1/2}$ | `ratio` |
| $\omega_i, \lambda_i$ | `spectra()` |
| $k = c^2 \beta_2 / \beta_1$, $\tau = \beta_2 \eta^2 / \beta_1$ | `k`, `tau` |
| $b_i = \omega_i^2 + k$ | `b` |

Modes of the data, of $z_1$ and of $z_2$ pair up, largest $\theta$ with the least fixed
variance; only the first $\min(d_1, d_2)$ can have $\omega > 0$. With $\Sigma_1$ fixed
each mode is one of three: learned by both ($\lambda, \omega > 0$), noise of $z_1$ that
$z_2$ explains ($\lambda = 0 < \omega$), or collapsed in $z_2$ ($\omega = 0$).

With $\Sigma_1$ learned the loss separates into one of the $c_i$ and one of the $m_i$.
With both learned, $z_2$ collapses completely for $\beta_2 > \beta_1$, is irrelevant on
a continuum of minima for $\beta_2 = \beta_1$, and there is no minimum for
$\beta_2 < \beta_1$: the case that the source leaves open.

*Reference:* Dang et al. 2023, Theorems 4 and 5. *Errata:* $V_1 = P \Lambda S^\top$
with the right singular vectors of Z; $W_2^* = U_2^\top (U_2 U_2^\top + k)^{-1}$ and
$\Sigma_2^* = (\beta_2/\beta_1) \eta^2 (U_2^\top U_2 + k)^{-1}$, with k where $c^2$ is
printed; $\omega^2 = (\sigma_1^2 - \tau)/e^2$ in case b, printed without the square;
(106) lacks $\sqrt{\beta_2/\beta_1}$; thresholds are those of `collapse_threshold`.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..arguments import checked_arguments
from ..models.base import EnergyBelow
from ..models.hvae import HierarchicalELBO, LinearHVAE
from ..models.linear import LinearMap
from ..models.vae import CholeskyCovariance
from ..spectrum import eigh_descending
from ..types import Scalar
from .base import AbstractTheory, learned_modes, Match, match_by_gradient
from .latent_modes import TIE, tie_of
from .vae import below, gradient_noise, refuse_unless, whole


class HVAETheory(AbstractTheory[LinearHVAE]):
    r"""The minimum of `HierarchicalELBO` with `latent_1` and `latent_2` latents.

    **Arguments:**

    - `rank_1`: the narrowest hidden width of the maps between x and $z_1$; `rank_2`: of
      those between $z_1$ and $z_2$. By default none is narrower than the latents.

    **Raises:** `ValueError` for whole numbers out of range; where the loss is
    unbounded below (both covariances learned, $\beta_2 < \beta_1$); and for the cases
    without a closed form: a fixed `covariance_1` that is no multiple of the identity,
    with a fixed `covariance_2` or with fewer $z_2$ than $z_1$.
    """

    energy: HierarchicalELBO
    latent_1: int = eqx.field(static=True)
    latent_2: int = eqx.field(static=True)
    theta: Float[Array, " modes"]
    vectors: Float[Array, "x modes"]
    turn_1: Float[Array, "latent_1 latent_1"]
    turn_2: Float[Array, "latent_2 latent_2"]
    taken: Float[Array, " latent_1"]
    ratio: Float[Array, " latent_1"]
    second: Float[Array, " latent_1"]
    omega2: Float[Array, " latent_1"]
    thresholds: Float[Array, " latent_1"]
    least: Scalar

    @checked_arguments
    def __init__(
        self,
        energy: HierarchicalELBO,
        latent_1: int,
        latent_2: int,
        *,
        rank_1: int | None = None,
        rank_2: int | None = None,
    ):
        latent_1, latent_2 = whole("latent_1", latent_1), whole("latent_2", latent_2)
        coupled = min(latent_1, latent_2)
        rank_1 = latent_1 if rank_1 is None else whole("rank_1", rank_1)
        rank_2 = coupled if rank_2 is None else whole("rank_2", rank_2)
        for name, rank, most in (
            ("rank_1", rank_1, latent_1),
            ("rank_2", rank_2, coupled),
        ):
            if rank > most:
                raise ValueError(
                    f"{name}={rank} is larger than {most}, the latents there are: "
                    "leave it out unless hidden layers are narrower"
                )
        for name, size in (("covariance_1", latent_1), ("covariance_2", latent_2)):
            fixed = getattr(energy, name)
            if fixed is not None and fixed.shape != (size, size):
                raise ValueError(
                    f"the energy's fixed {name} has shape {fixed.shape}, but there are "
                    f"{size} of these latents"
                )
        self.energy, self.latent_1, self.latent_2 = energy, latent_1, latent_2
        least, allowed, isotropic, solved = _solved(
            energy, latent_1, latent_2, rank_1, min(coupled, rank_2)
        )
        if energy.covariance_1 is None and energy.covariance_2 is None:
            least = refuse_unless(
                allowed,
                least,
                "the loss is unbounded below for beta_2 < beta_1 with both covariances "
                "learned (the scale of z_1 grows without limit): take beta_2 >= beta_1 "
                "or fix covariance_1",
            )
        if energy.covariance_1 is not None and (
            energy.covariance_2 is not None or min(coupled, rank_2) < latent_1
        ):
            least = refuse_unless(
                isotropic,
                least,
                "a fixed covariance_1 that is no multiple of the identity has a closed "
                "form only with covariance_2 learned and no fewer z_2 than z_1: "
                "minimize numerically",
            )
        self.least = least
        self.theta, self.vectors, self.turn_1, self.turn_2, *rest = solved
        self.taken, self.ratio, self.second, self.omega2, self.thresholds = rest

    def optimal_energy(self) -> Scalar:
        """The least loss. *Reference:* Dang et al. 2023, Theorems 4 and 5."""
        return self.least

    def spectrum(self) -> Float[Array, " modes"]:
        r"""$\theta_i$: roots of the eigenvalues of $\mathbb{E}\,xx^\top$."""
        return self.theta

    def spectra(self) -> dict[str, Float[Array, " latent"]]:
        r"""At the minimum of `optimum`: the singular values of the decoders ($U_2$ is
        $\omega$) and of the encoders ($V_1 = W_1 A^{1/2}$ is $\lambda$), and
        eigenvalues of the covariances.

        Other minima have others with $\Sigma_1$ fixed at no multiple of the identity;
        with both learned and $\beta_2 = \beta_1$; and (of level 1 only) with $\Sigma_1$
        alone learned, where the m differ, since any m can go with any c."""
        k, variance = _constants(self.energy)
        ratio = self.energy.beta_2 / self.energy.beta_1
        scale = jnp.sqrt(self.omega2)
        sigma_2 = ratio * variance / (self._both(self.omega2) + k)
        if self.energy.covariance_2 is not None:
            sigma_2 = jnp.linalg.eigvalsh(self.energy.covariance_2)
        return {
            "encoder_1": jnp.sqrt(self.second - self.second / self.ratio),
            "encoder_2": self._both(scale / (self.omega2 + k)),
            "decoder_1": self.taken * jnp.sqrt((1 - 1 / self.ratio) / self.second),
            "decoder_2": self._both(scale),
            "covariance_1": self.second / self.ratio,
            "covariance_2": sigma_2,
        }

    def collapsed(self, level: int = 2) -> Scalar | Any:
        r"""How many dimensions of $z_2$ (or of $z_1$: those that say nothing of x) have
        collapsed at the minimum of `optimum`."""
        if level not in (1, 2):
            raise ValueError(f"level must be 1 (z_1) or 2 (z_2), got {level!r}")
        if level == 1:
            return self.latent_1 - jnp.sum(self.ratio > 1)
        return self.latent_2 - jnp.sum(self.omega2 > 0)

    def collapse_threshold(self, mode: int) -> Scalar:
        r"""The $\beta_2$ from which on dimension `mode` of $z_2$ (0 is that of the
        largest $\theta$) has collapsed:

        - $\Sigma_1$ fixed: $\max(\sqrt{\beta_1} \sigma_1 \theta_i, \beta_1 \sigma_1^2)
          / \eta^2$, and times $e^2/\sigma_2^2$ if $\Sigma_2$ is fixed too;
        - $\Sigma_1$ learned: $\beta_1$, times $e^2/\sigma_2^2$ if $\Sigma_2$ is fixed.

        0 for dimensions that no mode is left for. *Erratum:* printed as $\theta_i$ for
        $\sigma_1 = \eta = \beta_1 = 1$; those with $\theta_i < 1$ all collapse at 1.
        """
        if not 0 <= mode < self.latent_2:
            raise ValueError(
                f"mode={mode} must be from 0 to {self.latent_2 - 1}: there are "
                f"{self.latent_2} of z_2"
            )
        if mode >= self.latent_1:
            return jnp.zeros_like(self.least)
        return self.thresholds[mode]

    def optimum(self) -> LinearHVAE:
        r"""$V_1 = P \Lambda S^\top$, $U_2 = P \Omega Q^\top$, and the others from them:
        $U_1 = Z V_1^\top M^{-1}$, $W_2 = U_2^\top (U_2 U_2^\top + k)^{-1}$, $\Sigma_2 =
        (\beta_2/\beta_1) \eta^2 (U_2^\top U_2 + k)^{-1}$."""
        return _optimum(self)

    def active(self, point: LinearHVAE) -> Bool[Array, " modes"]:
        """Of the modes of the data that the minimum has learned, those that have come
        more than half of their way."""
        goal = 1 - 1 / self.ratio
        kept = min(self.latent_1, self.theta.size)
        goals = jnp.zeros_like(self.theta).at[:kept].set(goal[:kept])
        turned = self.vectors.T @ point.decoder_1.matrix()
        pulled = point.encoder_1.matrix() @ self.vectors
        aligned = jnp.sum(turned.T * pulled, axis=0)
        share = jnp.where(goals > 0, aligned / jnp.where(goals > 0, goals, 1), 0)
        values = self.theta**2
        learned = learned_modes(jnp.clip(share, 0, 1), values, TIE * values[0])
        return learned & (goals > 0)

    @property
    def certificate(self) -> EnergyBelow[LinearHVAE]:
        """Whether the loss is the least, to 1e-9 of its size: other critical values
        are not known in closed form."""
        return below(self.energy, self.least, jnp.zeros_like(self.least), self._size())

    def match(self, point: LinearHVAE) -> Match:
        """`value` is that of the minimum: other critical values are not known."""
        return match_by_gradient(
            self.energy,
            point,
            optimal=self.energy(point) - self.least <= tie_of(self.least),
            modes=self.active(point),
            value=self.least,
            noise=gradient_noise(point, self._size() + jnp.abs(self.least)),
        )

    def remaining(self, point: LinearHVAE) -> Scalar:
        """Infinite: no time is predicted."""
        del point
        return jnp.full_like(self.least, jnp.inf)

    def _size(self):
        return jnp.trace(self.energy.moments.xx) / self.energy.decoder_std**2

    def _both(self, values):
        """Of the modes that z_1 and z_2 share, to all of z_2."""
        kept = min(self.latent_1, self.latent_2)
        return jnp.zeros(self.latent_2, values.dtype).at[:kept].set(values[:kept])


def _constants(energy):
    variance = energy.decoder_std**2
    k = variance / energy.prior_std**2 * energy.beta_2 / energy.beta_1
    return k, variance


@eqx.filter_jit
def _solved(energy, latent_1, latent_2, rank_1, coupled):
    """The least loss, whether it exists and has this form, and each mode's numbers."""
    squares, vectors = eigh_descending(energy.moments.xx)
    squares = jnp.maximum(squares, 0)
    theta, dtype = jnp.sqrt(squares), squares.dtype
    kept = min(rank_1, theta.size)
    taken = jnp.zeros(latent_1, dtype).at[:kept].set(theta[:kept])
    sigma_1, turn_1 = _fixed(energy.covariance_1, latent_1, dtype)
    sigma_2, turn_2 = _fixed(energy.covariance_2, latent_2, dtype)
    # Of the latent of z_2 that goes with each of z_1.
    paired = (
        jnp.ones(latent_1, dtype)
        .at[: min(latent_1, latent_2)]
        .set(sigma_2[: min(latent_1, latent_2)])
    )
    may = jnp.arange(latent_1) < coupled
    learned = energy.covariance_1 is None, energy.covariance_2 is None
    if learned[0]:
        found = _first_learned(energy, taken, paired, may, learned[1])
    else:
        found = _first_fixed(energy, taken, sigma_1, paired, may, learned[1])
    ratio, second, b, thresholds = found

    k, variance = _constants(energy)
    both = jnp.arange(latent_1) < min(latent_1, latent_2)
    prior = energy.beta_2 / energy.prior_std**2
    loss = (
        jnp.sum(squares) - jnp.sum(taken**2 * (1 - 1 / ratio))
    ) / variance + prior * jnp.sum(second / b)
    loss = loss - energy.beta_1 * jnp.sum(jnp.log(second / ratio))
    if learned[1]:
        idle = max(latent_2 - latent_1, 0)
        logs = jnp.sum(jnp.where(both, jnp.log(b), 0)) + idle * jnp.log(k)
        tau = energy.beta_2 * variance / energy.beta_1
        loss = loss + energy.beta_2 * (logs + latent_2 * (1 - jnp.log(tau)))
    else:
        coupling = jnp.sum(jnp.where(both, paired**2 * (b - k), 0))
        loss = loss + energy.beta_1 / variance * coupling + prior * jnp.sum(sigma_2**2)
        loss = loss - 2 * energy.beta_2 * jnp.sum(jnp.log(sigma_2))
    isotropic = sigma_1[-1] - sigma_1[0] <= 1e-9 * sigma_1[-1]
    return (
        loss,
        energy.beta_2 >= energy.beta_1,
        isotropic,
        (theta, vectors, turn_1, turn_2, taken, ratio, second, b - k, thresholds),
    )


def _fixed(covariance, size, dtype):
    """Standard deviations, ascending, and directions; 1 where they are learned."""
    if covariance is None:
        return jnp.ones(size, dtype), jnp.eye(size, dtype=dtype)
    values, vectors = jnp.linalg.eigh(covariance)
    return jnp.sqrt(values), vectors


def _first_fixed(energy, theta, sigma_1, sigma_2, may, second_learned):
    k, variance = _constants(energy)
    beta_1, beta_2, prior_std = energy.beta_1, energy.beta_2, energy.prior_std
    product = jnp.sqrt(beta_1) * sigma_1 * theta
    threshold = jnp.maximum(product, beta_1 * sigma_1**2) / variance
    if second_learned:
        m = sigma_1**2 * jnp.maximum(1, theta**2 / (beta_2 * variance))
        b = m / prior_std**2
        through = m >= beta_2 * variance / beta_1
    else:
        threshold = threshold * (prior_std / sigma_2) ** 2
        # c sigma_2, of a decoder's standard deviation.
        scale = energy.decoder_std / prior_std * sigma_2
        cube = sigma_1**2 * theta**2 / (scale * jnp.sqrt(beta_1 * beta_2))
        t = jnp.maximum(sigma_1, jnp.cbrt(cube))
        m, ratio = t**2, jnp.sqrt(beta_2 / beta_1)
        b = energy.decoder_std / prior_std / sigma_2 * ratio * t
        through = t >= scale * ratio
    alone = jnp.maximum(sigma_1**2, product / beta_1)
    through = through & may
    m, b = jnp.where(through, m, alone), jnp.where(through, jnp.maximum(b, k), k)
    return m / sigma_1**2, m, b, jnp.where(may, threshold, 0.0)


def _first_learned(energy, theta, sigma_2, may, second_learned):
    k, variance = _constants(energy)
    ratio = jnp.maximum(1, theta**2 / (energy.beta_1 * variance))
    m, b = jnp.full_like(theta, 1) * variance, jnp.full_like(theta, 1) * k
    threshold = jnp.full_like(theta, 1) * energy.beta_1
    if not second_learned:
        threshold = threshold * (energy.prior_std / sigma_2) ** 2
        through = may & (energy.beta_2 < threshold)
        # m = beta_1 eta^4 / (beta_2 c^2 sigma_2^2)
        larger = threshold / energy.beta_2 * variance
        m = jnp.where(through, larger, m)
        scale = energy.decoder_std / energy.prior_std / sigma_2
        larger = scale * jnp.sqrt(energy.beta_2 / energy.beta_1 * larger)
        b = jnp.where(through, jnp.maximum(larger, k), b)
    return ratio, m, b, jnp.where(may, threshold, 0.0)


@eqx.filter_jit
def _optimum(theory: HVAETheory) -> LinearHVAE:
    energy, taken = theory.energy, theory.taken
    k, variance = _constants(energy)
    kept = min(theory.latent_1, theory.theta.size)
    both = min(theory.latent_1, theory.latent_2)
    encoder = jnp.sqrt(theory.second - theory.second / theory.ratio)
    pull = jnp.where(taken > 0, encoder / jnp.where(taken > 0, taken, 1), 0)
    encoder_1 = (theory.turn_1 * pull[None, :])[:, :kept] @ theory.vectors[:, :kept].T
    back = encoder_1.T @ ((theory.turn_1 / theory.second[None, :]) @ theory.turn_1.T)
    scaled = theory.turn_1 * jnp.sqrt(theory.omega2)[None, :]
    decoder_2 = scaled[:, :both] @ theory.turn_2[:, :both].T
    encoder_2 = decoder_2.T @ jnp.linalg.inv(
        decoder_2 @ decoder_2.T + k * jnp.eye(theory.latent_1, dtype=taken.dtype)
    )
    covariance_1 = covariance_2 = None
    if energy.covariance_1 is None:
        own = theory.second / theory.ratio
        covariance_1 = CholeskyCovariance.of(jnp.diag(own))
    if energy.covariance_2 is None:
        own = decoder_2.T @ decoder_2
        own = own + k * jnp.eye(theory.latent_2, dtype=taken.dtype)
        scale = energy.beta_2 / energy.beta_1 * variance
        covariance_2 = CholeskyCovariance.of(scale * jnp.linalg.inv(own))
    return LinearHVAE(
        LinearMap(encoder_1),
        LinearMap(encoder_2),
        LinearMap(energy.moments.xx @ back),
        LinearMap(decoder_2),
        covariance_1,
        covariance_2,
    )
