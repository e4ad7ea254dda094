r"""Heywood cases of factor analysis: where noise variances go to 0, and how fast.

With $\psi_J = 0$ and $|J| \le K$ the variables $J$ are $|J|$ of the latent variables,
turned and scaled. The covariance of $J$ and the regression of the others on $J$ are
then free, and what is left is factor analysis of the conditional covariance with
$K - |J|$ latent variables:

$$E_J = \tfrac12 (|J| \log 2\pi + \log|S_{JJ}| + |J|) + E_{K - |J|}(S_{RR} - S_{RJ}
S_{JJ}^{-1} S_{JR}).$$

Near such a point $E - E_J = \sum_{j \in J} s_j \psi_j$ to first order. If all slopes
$s_j$ are positive and the rest is at a minimum, runs go there, and slowly:

| | $\psi_j(t)$ | $E - E_J$ |
|---|---|---|
| EM, after $t$ steps | $1 / (2 s_j t)$ | $\lvert J \rvert / (2t)$ |
| gradient flow in $\log\psi_j$ | $1 / (s_j t)$ | $\lvert J \rvert / t$ |

*Reference:* Joereskog (1967) for the reduction, *Some contributions to maximum
likelihood factor analysis*; the rates follow from EM's step $\psi_j \mapsto \psi_j - 2
\psi_j^2 \, \partial E / \partial\psi_j$ and are not printed there.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arguments import check_whole, checked_arguments
from ..models.factor import LatentGaussian, NegativeLogLikelihood
from ..moments import Moments
from ..noise import Diagonal
from ..types import Scalar


class HeywoodCase(eqx.Module):
    r"""Factor analysis with `latents` latent variables and no noise in `variables`.

    `rest` is the energy of the others, given these.

    **Raises:** `ValueError` if the energy has a pattern, or for more variables than
    latent ones, none, or all.
    """

    variables: tuple[int, ...] = eqx.field(static=True)
    latents: int = eqx.field(static=True)
    rest: NegativeLogLikelihood
    constant: Scalar
    coefficients: Float[Array, "rest chosen"]

    @checked_arguments
    def __init__(
        self, energy: NegativeLogLikelihood, latents: int, variables: Sequence[int]
    ):
        check_whole("latents", latents)
        chosen = sorted({int(j) for j in variables})
        size = energy.size
        if energy.pattern is not None:
            raise ValueError(
                "the energy has a pattern: the reduction is about factor analysis, "
                "where all loadings are free"
            )
        if not chosen or chosen[0] < 0 or chosen[-1] >= size or len(chosen) == size:
            raise ValueError(
                f"variables={tuple(variables)} must be some, not all, of 0 to "
                f"{size - 1}"
            )
        if len(chosen) > latents:
            raise ValueError(
                f"variables={tuple(chosen)} are more than latents={latents}: without "
                "noise they would be latent variables"
            )
        kept = np.setdiff1d(np.arange(size), chosen).tolist()
        covariance = energy.covariance
        own = covariance[np.ix_(chosen, chosen)]
        coefficients = jnp.linalg.solve(own, covariance[np.ix_(chosen, kept)]).T
        left = covariance[np.ix_(kept, kept)] - (
            coefficients @ covariance[np.ix_(chosen, kept)]
        )
        left = (left + left.T) / 2
        moments = Moments(left, left, left, energy.moments.count, autoencoding=True)
        # Without a latent variable left: one that loads on nothing.
        pattern = np.zeros((len(kept), 1), bool) if latents == len(chosen) else None
        self.variables, self.latents = tuple(chosen), latents
        self.rest = NegativeLogLikelihood(moments, pattern, energy.floor)
        count = len(chosen)
        log_determinant = jnp.linalg.slogdet(own)[1]
        self.constant = 0.5 * (count * (math.log(2 * math.pi) + 1) + log_determinant)
        self.coefficients = coefficients

    @property
    def kept(self) -> np.ndarray:
        """The other variables."""
        size = len(self.coefficients) + len(self.variables)
        return np.setdiff1d(np.arange(size), self.variables)

    def energy(self, rest: LatentGaussian) -> Scalar:
        """$E_J$ at a point of the others."""
        return self.constant + self.rest(rest)

    def reduced(self, point: LatentGaussian) -> LatentGaussian:
        """What a point is to the others: the loadings that $J$ has no part in."""
        if not isinstance(point.noise, Diagonal):
            raise ValueError(
                f"the noise is {type(point.noise).__name__}: the reduction is about "
                "factor analysis, with Diagonal noise"
            )
        count = len(self.variables)
        # Behind the first columns of Q, loadings of J are 0.
        turned = jnp.linalg.qr(
            point.loadings[np.asarray(self.variables)].T, mode="complete"
        )[0]
        loadings = point.loadings[self.kept] @ turned[:, count:]
        if count == self.latents:
            loadings = jnp.zeros((len(self.kept), 1), point.loadings.dtype)
        return LatentGaussian(loadings, Diagonal(point.noise.log_variances[self.kept]))

    def slopes(self, rest: LatentGaussian) -> Float[Array, " chosen"]:
        r"""$s_j = \partial E / \partial\psi_j$ at $\psi_J = 0$: $\frac12 b_j^\top
        C^{-1} (C - S) C^{-1} b_j$ with the $C$ and $S$ of the others, given $J$, and
        the coefficients $b_j$ of their regression on $x_j$."""
        covariance = self.rest.held(rest).covariance()
        spread = jnp.linalg.solve(covariance, self.coefficients)
        off = covariance - self.rest.covariance
        return 0.5 * jnp.sum(spread * (off @ spread), axis=0)
