r"""Linear VAEs: the minimum of the exact ELBO, and which latents have collapsed there.

| on paper | in code |
|---|---|
| $A = \mathbb{E}\,xx^\top = P \Phi P^\top$ | `moments.xx`, `vectors` |
| $\Phi_i = \theta_i^2$ | `spectrum()` |
| $U = P \Omega T^\top$, $V = W P \Phi^{1/2} = T \Lambda$ | `optimum()`, `spectra()` |
| $\beta \ge \theta_i^2 / \eta^2$ | `collapse_threshold(i)` |

$T$ is any orthogonal matrix for a covariance that is learned in full, or fixed at a
multiple of the identity; a signed permutation for a diagonal one. Only with a diagonal
one are rows of $V$ forced to 0 where latents collapse; else a latent subspace does.

*Reference:* Dang et al. 2023, Theorems 2 and 3, Appendix C. *Errata:* the conditions
are $\theta_i^2 \ge \beta\eta^2$; gradient (39) lacks a factor $\beta$.
"""

import abc
from typing import Any, Generic

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..arguments import checked_arguments
from ..models.base import EnergyBelow
from ..models.linear import LinearMap
from ..models.vae import (
    CholeskyCovariance,
    DiagonalCovariance,
    LinearVAE,
    NegativeELBO,
)
from ..spectrum import eigh_descending
from ..types import P, Scalar
from .base import AbstractTheory, learned_modes, Match, match_by_gradient
from .latent_modes import LatentModes, TIE, tie_of


class AbstractPosteriorTheory(AbstractTheory[P], Generic[P]):
    """What holds for VAEs and conditional ones alike.

    To implement your own: state the fields, `optimum` and `explained`.
    """

    modes: eqx.AbstractVar[LatentModes]
    vectors: eqx.AbstractVar[Float[Array, "data modes"]]
    # Of the minimum: the least loss, and from it to the next critical value.
    least: eqx.AbstractVar[Scalar]
    gap: eqx.AbstractVar[Scalar]
    # The trace of the second moment of what is decoded.
    total: eqx.AbstractVar[Scalar]

    @abc.abstractmethod
    def optimum(self) -> P:
        """A global minimizer."""

    @abc.abstractmethod
    def explained(self, point: P) -> Float[Array, "data data"]:
        """The decoder times the encoder, from the data to the data."""

    def optimal_energy(self) -> Scalar:
        return self.least

    def spectrum(self) -> Float[Array, " modes"]:
        """The variances of the data's modes (given x, for a conditional VAE)."""
        return self.modes.variances

    def spectra(self) -> dict[str, Float[Array, " latent"]]:
        r"""At the minimum, the singular values of the decoder ($\omega$) and of the
        whitened encoder ($\lambda$), and the eigenvalues of $\Sigma$: those of the
        latents that take up the data's largest modes first."""
        return {
            "decoder": self.modes.decoder(),
            "encoder": self.modes.encoder(),
            "covariance": self.modes.covariance(),
        }

    def collapsed(self) -> Scalar | Any:
        """How many latents (dimensions of latent space) have collapsed at the
        minimum."""
        return self.modes.latent - jnp.sum(self.modes.active())

    def collapse_threshold(self, mode: int) -> Scalar:
        """The beta from which on mode `mode` (0 is the largest) is not learned."""
        return self.modes.threshold(mode)

    def active(self, point: P) -> Bool[Array, " modes"]:
        """The modes of the data that have come more than half of their way."""
        modes, values = self.modes, self.spectrum()
        variance = modes.decoder_variance()
        roots = jnp.sqrt(jnp.where(values > 0, values, 1))
        if modes.stds is None:
            goal = 1 - modes.beta * variance / roots**2
        else:
            # By whichever latent could learn it, the one that learns least of it.
            kappa = jnp.sqrt(modes.beta * variance) * modes.stds / modes.prior_std
            goals = 1 - kappa[:, None] / roots[None, :]
            goal = jnp.min(jnp.where(goals > 0, goals, 1), axis=0)
            goal = jnp.where(jnp.any(goals > 0, axis=0), goal, 0)
        able = (values > 0) & (goal > 0)
        turned = self.vectors.T @ self.explained(point)
        aligned = jnp.sum(turned.T * self.vectors, axis=0)
        share = jnp.where(able, aligned / jnp.where(able, goal, 1), 0)
        share = jnp.clip(share, 0, 1)
        return learned_modes(share, values, TIE * values[0]) & able

    @property
    def certificate(self) -> EnergyBelow[P]:
        """Whether the loss is below every critical value but the least.

        The exact flow never increases the loss and converges (its sublevel sets are
        bounded), so its limit is then a global minimizer.
        """
        return below(self.energy, self.least, self.gap, self._size())

    def match(self, point: P) -> Match:
        modes = self.active(point)
        return match_by_gradient(
            self.energy,
            point,
            optimal=self.energy(point) - self.least <= tie_of(self.least),
            modes=modes,
            value=self.modes.critical_value(modes),
            noise=gradient_noise(point, self._size() + jnp.abs(self.least)),
        )

    def remaining(self, point: P) -> Scalar:
        """Infinite: no time is predicted."""
        del point
        return jnp.full_like(self.least, jnp.inf)

    def _size(self):
        return self.total / self.modes.decoder_variance()


class VAETheory(AbstractPosteriorTheory[LinearVAE]):
    r"""The minimum of `NegativeELBO` with `latent` latents.

    **Arguments:**

    - `rank`: the narrowest hidden width of deep maps; by default none is narrower than
      the latent space.
    - `diagonal`: the learned covariance is diagonal. The minimum is the same, other
      critical points are not.

    **Raises:** `ValueError` for whole numbers out of range, a fixed covariance of
    another size, or a decoder variance that would go to 0.
    """

    energy: NegativeELBO
    modes: LatentModes
    vectors: Float[Array, "data modes"]
    least: Scalar
    gap: Scalar
    total: Scalar
    turn: Float[Array, "latent latent"]

    @checked_arguments
    def __init__(
        self,
        energy: NegativeELBO,
        latent: int,
        *,
        rank: int | None = None,
        diagonal: bool = False,
    ):
        self.energy = energy
        solved = solve_modes(energy, energy.moments.xx, latent, rank, diagonal)
        self.modes, self.vectors, self.turn, self.least, self.gap = solved
        self.total = jnp.trace(energy.moments.xx)

    def optimum(self) -> LinearVAE:
        r"""$U = P\Omega T^\top$, $W = (U^\top U + \beta c^2)^{-1} U^\top$ and $\Sigma =
        \beta\eta^2 (U^\top U + \beta c^2)^{-1}$. The minimizers are all of this form
        (plus anything on the kernel of $A$), see the top of this file.

        *Reference:* Dang et al. 2023, Theorem 3 and (38), (39).
        """
        decoder, encoder, covariance, log_variance = self.parts()
        return LinearVAE(
            LinearMap(encoder), LinearMap(decoder), covariance, log_variance
        )

    def parts(self):
        """Decoder, encoder, covariance and logarithm of the decoder's variance."""
        return optimal_parts(self.modes, self.vectors, self.turn)

    def explained(self, point: LinearVAE) -> Float[Array, "data data"]:
        return point.decoder.matrix() @ point.encoder.matrix()


def solve_modes(energy, covariance, latent: int, rank: int | None, diagonal: bool):
    """The scalar problem of a data covariance, its eigenvectors, those of a fixed
    encoder covariance, and the least loss with the gap above it."""
    latent = whole("latent", latent)
    rank = latent if rank is None else whole("rank", rank)
    if rank > latent:
        raise ValueError(
            f"rank={rank} is larger than latent={latent}: leave it out unless hidden "
            "layers are narrower than the latent space"
        )
    fixed = energy.covariance
    if fixed is not None and fixed.shape != (latent, latent):
        raise ValueError(
            f"latent={latent} but the energy's fixed covariance has shape "
            f"{fixed.shape}: give latent={fixed.shape[0]}"
        )
    solved = _solved(energy, covariance, latent, rank, bool(diagonal))
    modes, bounded = solved[0], solved[-1]
    least = refuse_unless(
        bounded,
        solved[3],
        f"the loss is unbounded below: {rank} latents can explain all of the data, so "
        "the learned decoder variance goes to 0; use fewer latents or fix decoder_std",
    )
    return modes, solved[1], solved[2], least, solved[4]


@eqx.filter_jit
def _solved(energy, covariance, latent, rank, diagonal):
    variances, vectors = eigh_descending(covariance)
    variances = jnp.maximum(variances, 0)
    stds, turn = None, jnp.eye(latent, dtype=variances.dtype)
    if energy.covariance is not None:
        squares, turn = jnp.linalg.eigh(energy.covariance)
        stds = jnp.sqrt(squares)
    modes = LatentModes(
        variances,
        energy.beta,
        energy.decoder_std,
        energy.prior_std,
        stds,
        latent,
        rank,
        len(covariance),
        diagonal,
    )
    return modes, vectors, turn, modes.value(), modes.least_gap(), modes.bounded()


@eqx.filter_jit
def optimal_parts(modes: LatentModes, vectors, turn):
    """A minimizer's decoder, encoder, covariance and log of the decoder's variance."""
    kept = min(modes.latent, vectors.shape[1])
    variance, omega = modes.decoder_variance(), modes.decoder()
    penalty = modes.beta * variance / modes.prior_std**2
    scaled = vectors[:, :kept] * omega[None, :kept]
    decoder = scaled @ turn[:, :kept].T
    pulled = scaled / (omega[None, :kept] ** 2 + penalty)
    encoder = turn[:, :kept] @ pulled.T
    covariance = None
    if modes.stds is None:
        matrix = jnp.diag(modes.covariance())
        kind = DiagonalCovariance if modes.diagonal else CholeskyCovariance
        covariance = kind.of(matrix)
    learned = modes.decoder_std is None
    return decoder, encoder, covariance, jnp.log(variance) if learned else None


def below(energy, least: Scalar, gap: Scalar, size: Scalar) -> EnergyBelow:
    """The certificate of a theory that knows no critical value below `least + gap`,
    or, to rounding, none but the least."""
    gap = jnp.maximum((1 - 1e-6) * gap, tie_of(least))
    return EnergyBelow(
        energy,
        level=least + gap,
        noise=jnp.full_like(least, 500),
        offset=jnp.abs(least) - least + size,
    )


def gradient_noise(point, size: Scalar) -> Scalar:
    """Rounding of a differential, for an energy whose terms are of this size."""
    leaves = [leaf for leaf in jax.tree.leaves(point) if leaf.size > 0]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
    return 64 * float(jnp.finfo(size.dtype).eps) * (1 + size) * (1 + largest)


def whole(name: str, value: Any) -> int:
    """A whole number >= 1.

    **Raises:** `ValueError` for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return int(value)


def refuse_unless(condition, value, message: str):
    """`value`, if the condition holds.

    **Raises:** `ValueError`, or under a transformation when the program runs.
    """
    if isinstance(condition, jax.core.Tracer):
        return eqx.error_if(value, ~condition, message)
    if not bool(condition):
        raise ValueError(message)
    return value
