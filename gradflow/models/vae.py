r"""Linear variational autoencoders and their exact negative ELBO.

| on paper | in code |
|---|---|
| $q(z \mid x) = N(Wx, \Sigma)$ | `LinearVAE.encoder`, `covariance` |
| $p(x \mid z) = N(Uz, \eta^2 1)$ | `decoder`, `decoder_std` $\eta$ |
| $p(z) = N(0, e^2 1)$ | `prior_std` $e$ |
| $c = \eta / e$; $\beta$ | `beta` |
| $A = \mathbb{E}\, x x^\top$ | `moments.xx` |
| $d_1$, $D_0$ | latent and data dimension |

Everything in the point moves; what does not move lives in the energy. So a learned
encoder covariance is a field of the point and a fixed one a field of the energy, and
the same for the decoder's variance.

A flow depends on the coordinates of its unknowns. The minima of the energy do not, but
the path to them does, so the covariance comes in several coordinates.

*Reference:* Dang, Tran, Nguyen, Ho, *Posterior collapse in linear conditional and
hierarchical variational autoencoders* (2023). *Erratum:* its prior term is inside the
bracket with $1/\eta^2$ (App. B.2.1), and $c$ is $\eta/e$, not $\eta^2/e^2$.
"""

import abc
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arguments import check_sides, checked_fields
from ..moments import Moments
from ..types import Scalar
from .base import AbstractEnergy, as_array, check_positive
from .linear import AbstractLinearNetwork, DeepLinear, LinearMap


class AbstractCovariance(eqx.Module):
    """Coordinates of a covariance that is learned.

    To implement your own: define `matrix` and `log_determinant`, for coordinates that
    may take any value.
    """

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "latent latent"]:
        r"""$\Sigma$."""

    @abc.abstractmethod
    def log_determinant(self) -> Scalar:
        r"""$\log|\Sigma|$."""


@checked_fields
class CholeskyCovariance(AbstractCovariance):
    r"""$\Sigma = LL^\top$ with $L$ lower triangular: the logarithms of its diagonal,
    and the entries `below` it, row by row."""

    log_diagonal: Float[Array, " latent"]
    below: Float[Array, " pairs"]

    def __check_init__(self):
        shapes = jnp.shape(self.log_diagonal), jnp.shape(self.below)
        size = shapes[0][0] if len(shapes[0]) == 1 else 0
        if size == 0 or shapes[1] != (size * (size - 1) // 2,):
            raise ValueError(
                f"log_diagonal and below have shapes {shapes[0]} and {shapes[1]}: they "
                "must be (latent,) and (latent (latent - 1) / 2,)"
            )

    @classmethod
    def of(cls, covariance: Float[Array, "latent latent"]) -> "CholeskyCovariance":
        """These coordinates of a positive definite matrix."""
        lower = jnp.linalg.cholesky(covariance)
        return cls(jnp.log(jnp.diagonal(lower)), lower[np.tril_indices(len(lower), -1)])

    def factor(self) -> Float[Array, "latent latent"]:
        """$L$."""
        diagonal = jnp.diag(jnp.exp(self.log_diagonal))
        return diagonal.at[np.tril_indices(len(diagonal), -1)].set(self.below)

    def matrix(self) -> Float[Array, "latent latent"]:
        factor = self.factor()
        return factor @ factor.T

    def log_determinant(self) -> Scalar:
        return 2 * jnp.sum(self.log_diagonal)


@checked_fields
class DiagonalCovariance(AbstractCovariance):
    r"""$\Sigma = \mathrm{diag}(e^{l})$: the encoder of a usual VAE."""

    log_variances: Float[Array, " latent"]

    def __check_init__(self):
        check_sides("log_variances", self.log_variances)

    @classmethod
    def of(cls, covariance: Float[Array, "latent latent"]) -> "DiagonalCovariance":
        """The diagonal of a positive definite matrix."""
        return cls(jnp.log(jnp.diagonal(covariance)))

    def matrix(self) -> Float[Array, "latent latent"]:
        return jnp.diag(jnp.exp(self.log_variances))

    def log_determinant(self) -> Scalar:
        return jnp.sum(self.log_variances)


@checked_fields
class RootCovariance(AbstractCovariance):
    r"""$\Sigma = FF^\top$ with any square $F$.

    Turning all of the latent space turns the flow in these coordinates with it, which
    is not so for a triangular factor.
    """

    factor: Float[Array, "latent latent"]

    def __check_init__(self):
        check_sides("factor", self.factor)

    @classmethod
    def of(cls, covariance: Float[Array, "latent latent"]) -> "RootCovariance":
        """The Cholesky factor of a positive definite matrix."""
        return cls(jnp.linalg.cholesky(covariance))

    def matrix(self) -> Float[Array, "latent latent"]:
        return self.factor @ self.factor.T

    def log_determinant(self) -> Scalar:
        return 2 * jnp.linalg.slogdet(self.factor)[1]


COORDINATES: dict[str, Any] = {
    "full": CholeskyCovariance,
    "diagonal": DiagonalCovariance,
    "root": RootCovariance,
}


@checked_fields
class LinearVAE(eqx.Module):
    r"""The unknowns of a linear VAE.

    - `covariance`: $\Sigma$ in its coordinates, or `None` where the energy holds a
      fixed one.
    - `log_decoder_variance`: $\log \eta^2$, or `None` where the energy holds a fixed
      $\eta$.
    """

    encoder: AbstractLinearNetwork
    decoder: AbstractLinearNetwork
    covariance: AbstractCovariance | None = None
    log_decoder_variance: Scalar | None = None

    @classmethod
    def zeros(
        cls,
        x: int,
        latent: int,
        *,
        covariance: str | None = "full",
        learn_decoder: bool = False,
        hidden: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    ) -> "LinearVAE":
        """Maps that are zero, and unit variances.

        **Arguments:**

        - `covariance`: learned as "full" (Cholesky), "diagonal" or "root", or `None`.
        - `learn_decoder`: whether the decoder's variance is.
        - `hidden`: the widths inside the encoder and inside the decoder.
        """
        return cls(
            zero_network((x, *hidden[0], latent)),
            zero_network((latent, *hidden[1], x)),
            unit_covariance(covariance, latent),
            jnp.zeros(()) if learn_decoder else None,
        )


@checked_fields
class NegativeELBO(AbstractEnergy[LinearVAE]):
    r"""The $\beta$-VAE's exact loss, up to constants:

    $$L = \frac{1}{\eta^2} \mathbb{E}\|UWx - x\|^2 + \frac{1}{\eta^2}
    \mathrm{tr}((U^\top U + \beta c^2) \Sigma) + \frac{\beta}{e^2} \mathbb{E}\|Wx\|^2
    - \beta \log|\Sigma|,$$

    with $D_0 \log \eta^2$ added where $\eta$ is learned. Twice the negative ELBO, per
    sample, is $L + D_0 \log 2\pi + \beta d_1 (\log e^2 - 1)$, and $D_0 \log \eta^2$
    where $\eta$ is fixed: see `elbo`.

    **Arguments:**

    - `moments`: of the data; only `xx` is used, and it may be singular.
    - `decoder_std`: $\eta$; `None` if the point has it.
    - `covariance`: $\Sigma$ where it is fixed; `None` if the point has it.

    **Raises:** `ValueError` for numbers that are not finite and > 0, a covariance that
    is not positive definite, and points whose widths or fields don't fit.
    """

    moments: Moments
    beta: float | Scalar = eqx.field(default=1.0, converter=as_array)
    decoder_std: float | Scalar | None = eqx.field(default=1.0, converter=as_array)
    prior_std: float | Scalar = eqx.field(default=1.0, converter=as_array)
    covariance: Float[Array, "latent latent"] | None = eqx.field(
        default=None, converter=as_array
    )

    def __check_init__(self):
        check_elbo(self)

    def __call__(self, point: LinearVAE) -> Scalar:
        encoder, decoder = point.encoder.matrix(), point.decoder.matrix()
        xx = self.moments.xx
        check_maps(
            encoder=(encoder.shape, (None, len(xx))),
            decoder=(decoder.shape, (len(xx), len(encoder))),
        )
        inner, pushed = decoder.T @ decoder, encoder @ xx
        code = pushed @ encoder.T
        residual = jnp.trace(xx) - 2 * jnp.sum(decoder.T * pushed)
        residual = residual + jnp.sum(inner * code)
        return assembled(self, point, len(xx), residual, inner, code)

    def elbo(self, point: LinearVAE) -> Scalar:
        r"""The mean over samples of
        $\mathbb{E}_q \log p(x \mid z) - \beta\, \mathrm{KL}(q(z \mid x) \| p(z))$."""
        latent = point.decoder.matrix().shape[1]
        return exact_elbo(self, point, len(self.moments.xx), latent)


def assembled(energy, point, dimension: int, residual, inner, code) -> Scalar:
    r"""The loss of a VAE or a conditional one, from the dimension of y,
    $\mathbb{E}\|U\mu - y\|^2$, $U^\top U$ and $\mathbb{E}\mu\mu^\top$, where $\mu$ is
    the code of a sample."""
    covariance, log_determinant = encoder_covariance(energy, point, len(code))
    variance, learned = decoder_variance(energy, point)
    weight = energy.beta / energy.prior_std**2
    loss = (
        (residual + jnp.sum(inner * covariance)) / variance
        + weight * (jnp.trace(code) + jnp.trace(covariance))
        - energy.beta * log_determinant
    )
    return loss + dimension * jnp.log(variance) if learned else loss


def exact_elbo(energy, point, dimension: int, latent: int) -> Scalar:
    """The ELBO itself from the loss, with its constants."""
    variance, learned = decoder_variance(energy, point)
    constant = dimension * float(np.log(2 * np.pi))
    constant = constant + energy.beta * latent * (2 * jnp.log(energy.prior_std) - 1)
    if not learned:
        constant = constant + dimension * jnp.log(variance)
    return -0.5 * (energy(point) + constant)


def gaussian_kl(variance, square, prior):
    r"""$\mathrm{KL}(N(\mu, s) \| N(0, p))$ from $s$, $\mu^2$ or its mean, and $p$."""
    ratio = variance / prior
    return 0.5 * (ratio + square / prior - 1 - jnp.log(ratio))


def encoder_covariance(energy, point, latent: int):
    r"""$\Sigma$ and $\log|\Sigma|$, from the point or from the energy."""
    return learned_or_fixed("covariance", point.covariance, energy.covariance, latent)


def learned_or_fixed(
    name: str, learned: Any, fixed: Any, latent: int
) -> tuple[Any, Any]:
    """A covariance and its log-determinant, given by the point or else the energy."""
    if (learned is None) == (fixed is None):
        state = "both have one" if learned is not None else "neither has one"
        raise ValueError(
            f"{name} is either learned (a field of the point) or fixed (a field of the "
            f"energy), but {state}"
        )
    if learned is not None:
        matrix, log_determinant = learned.matrix(), learned.log_determinant()
    else:
        matrix, log_determinant = fixed, jnp.linalg.slogdet(fixed)[1]
    if matrix.shape != (latent, latent):
        raise ValueError(
            f"{name} has shape {matrix.shape} but there are {latent} latents: it must "
            f"be ({latent}, {latent})"
        )
    return matrix, log_determinant


def decoder_variance(energy, point):
    r"""$\eta^2$, and whether the point has it."""
    learned = point.log_decoder_variance is not None
    if learned == (energy.decoder_std is not None):
        state = "both have one" if learned else "neither has one"
        raise ValueError(
            "the decoder's variance is either learned (log_decoder_variance of the "
            f"point) or fixed (decoder_std of the energy), but {state}"
        )
    if learned:
        return jnp.exp(point.log_decoder_variance), True
    return energy.decoder_std**2, False


def check_elbo(energy) -> None:
    """The numbers of an energy, and its fixed covariance."""
    check_positive("beta", energy.beta)
    check_positive("prior_std", energy.prior_std)
    if energy.decoder_std is not None:
        check_positive("decoder_std", energy.decoder_std)
    if energy.covariance is not None:
        check_covariance("covariance", energy.covariance)


def check_covariance(name: str, matrix: Any) -> None:
    """Refuses what is not a symmetric positive definite matrix.

    **Raises:** `ValueError`.
    """
    if isinstance(matrix, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return
    shape = np.shape(matrix)
    real = isinstance(matrix, jax.Array) and matrix.dtype.kind == "f"
    if not real or len(shape) != 2 or shape[0] != shape[1] or 0 in shape:
        raise ValueError(
            f"{name} must be an array of real numbers (latent, latent), got "
            f"{type(matrix).__name__} of shape {shape}"
        )
    values = np.asarray(matrix)
    if not np.all(np.isfinite(values)):
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(f"{name} has a non-finite value at {place}: give finite ones")
    if not np.allclose(values, values.T, rtol=1e-6, atol=0):
        raise ValueError(f"{name} isn't symmetric: give a covariance matrix")
    least = float(np.linalg.eigvalsh(values)[0])
    if least <= 0:
        raise ValueError(
            f"{name} must be positive definite, but its smallest eigenvalue is {least}"
        )


def check_maps(**maps) -> None:
    """Refuses maps whose shape is not the one that fits; `None` fits all."""
    for name, (shape, wanted) in maps.items():
        fits = [want in (None, have) for have, want in zip(shape, wanted, strict=True)]
        if not all(fits):
            named = tuple("latent" if want is None else want for want in wanted)
            raise ValueError(
                f"{name} maps {shape[1]} inputs to {shape[0]} outputs but the data and "
                f"the other maps need {named[1]} to {named[0]}"
            )


def zero_network(widths: tuple[int, ...]) -> AbstractLinearNetwork:
    """A linear network of zeros: one matrix for two widths, else a product."""
    weights = [jnp.zeros((out, into)) for into, out in itertools.pairwise(widths)]
    return LinearMap(weights[0]) if len(weights) == 1 else DeepLinear(tuple(weights))


def unit_covariance(kind: str | None, latent: int) -> AbstractCovariance | None:
    """The identity in the coordinates of this name, or `None`."""
    if kind is None:
        return None
    if kind not in COORDINATES:
        raise ValueError(
            f"covariance={kind!r} must be one of {', '.join(COORDINATES)}, or None "
            "where the energy holds a fixed one"
        )
    return COORDINATES[kind].of(jnp.eye(latent))
