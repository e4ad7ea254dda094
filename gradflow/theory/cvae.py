r"""Linear conditional VAEs: the minimum of the exact ELBO, and what collapses there.

| on paper | in code |
|---|---|
| $E = C_{yy} - C_{yx} C_{xx}^+ C_{xy}$ | `moments.conditional()` |
| $\theta_i$, the eigenvalues of $E$ | `spectrum()` |
| $U_1 = P_E \Omega R^\top$, $U_2 = C_{yx} C_{xx}^+$, $W_1 = -W_2 U_2$ | `optimum()` |
| $\beta \ge \theta_i / \eta^2$ | `collapse_threshold(i)` |

At every critical point (of maps that are single matrices) the skip path regresses y on
x, and the rest is the VAE of the residual $y - U_2 x$. So x = y leaves nothing and
everything collapses, and in general latents learn what x does not say about y.

*Reference:* Dang et al. 2023, Theorem 1. *Errata:* the test is $\theta_i \ge
\beta\eta^2$ with eigenvalues $\theta_i$ of E (printed $\sqrt\beta\eta$), and
(15)-(17), (23)-(25) have $\theta_i^2$ for $\theta_i$; $Z = \mathbb{E}\tilde x
\tilde y^\top$.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..arguments import checked_arguments
from ..models.cvae import ConditionalELBO, LinearCVAE
from ..models.linear import LinearMap
from ..types import Scalar
from .latent_modes import LatentModes
from .vae import AbstractPosteriorTheory, optimal_parts, solve_modes, whole


class CVAETheory(AbstractPosteriorTheory[LinearCVAE]):
    r"""The minimum of `ConditionalELBO` with `latent` latents.

    **Arguments:**

    - `rank`: the narrowest hidden width of the decoder and of the encoders; by default
      none is narrower than the latent space.
    - `skip_rank`: the narrowest hidden width of the skip path, if it has any.
    - `diagonal`: the learned covariance is diagonal.
    - `deep`: some map is a product. The minimum is the same; but then maps of lower
      rank are critical too, and only the value of the minimum certifies one.

    **Raises:** `ValueError` as `VAETheory`, or for a skip path too narrow for the
    regression of y on x: there is no closed form then.
    """

    energy: ConditionalELBO
    modes: LatentModes
    vectors: Float[Array, "data modes"]
    least: Scalar
    gap: Scalar
    total: Scalar
    turn: Float[Array, "latent latent"]
    regression: Float[Array, "y x"]

    @checked_arguments
    def __init__(
        self,
        energy: ConditionalELBO,
        latent: int,
        *,
        rank: int | None = None,
        skip_rank: int | None = None,
        diagonal: bool = False,
        deep: bool = False,
    ):
        self.energy = energy
        self.regression, left = _regressed(energy.moments)
        if skip_rank is not None:
            needed = int(jnp.linalg.matrix_rank(self.regression))
            if whole("skip_rank", skip_rank) < needed:
                raise ValueError(
                    f"skip_rank={skip_rank} is less than {needed}, the rank of the "
                    "regression of y on x: the minimum has no closed form then; widen "
                    "the skip path, or minimize numerically"
                )
        solved = solve_modes(energy, left, latent, rank, diagonal)
        self.modes, self.vectors, self.turn, self.least, gap = solved
        self.total = jnp.trace(energy.moments.yy)
        self.gap = jnp.zeros_like(gap) if deep else gap

    def optimum(self) -> LinearCVAE:
        r"""$U_1 = P_E \Omega R^\top$, $W_2 = (U_1^\top U_1 + \beta c^2)^{-1} U_1^\top$,
        $U_2 = C_{yx} C_{xx}^+$, $W_1 = -W_2 U_2$. What all minimizers share, where E
        has no ties: $U_1 U_1^\top$, $U_1 W_2$, $U_1 W_1$ and $U_2$ on the supports of
        E and x.

        *Reference:* Dang et al. 2023, Theorem 1.
        """
        decoder, encoder_y, covariance, log_variance = optimal_parts(
            self.modes, self.vectors, self.turn
        )
        return LinearCVAE(
            LinearMap(-encoder_y @ self.regression),
            LinearMap(encoder_y),
            LinearMap(decoder),
            LinearMap(self.regression),
            covariance,
            log_variance,
        )

    def explained(self, point: LinearCVAE) -> Float[Array, "data data"]:
        return point.decoder.matrix() @ point.encoder_y.matrix()


@eqx.filter_jit
def _regressed(moments):
    return moments.regression(), moments.conditional()
