r"""Linear conditional variational autoencoders and their exact negative ELBO.

| on paper | in code |
|---|---|
| $q(z \mid x, y) = N(W_1 x + W_2 y, \Sigma)$ | `encoder_x`, `encoder_y`, `covariance` |
| $p(y \mid z, x) = N(U_1 z + U_2 x, \eta^2 1)$ | `decoder`, `skip`, `decoder_std` |
| $p(z) = N(0, e^2 1)$ | `prior_std` |
| $c = \eta / e$; $\beta$ | `beta` |
| $\mathbb{E}\,xx^\top, \mathbb{E}\,xy^\top, \mathbb{E}\,yy^\top$ | `moments` |

*Reference:* Dang, Tran, Nguyen, Ho 2023, sections 3 and B.2. *Erratum:* in
Proposition 1, $U_1 V_2 - I$ is $U_1 V_2 - D$ and $\Sigma_1$ is $\Sigma$; whitening
bases, which need invertible moments, are not needed here.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..arguments import checked_fields
from ..moments import Moments
from ..types import Scalar
from .base import AbstractEnergy, as_array
from .linear import AbstractLinearNetwork
from .vae import (
    AbstractCovariance,
    assembled,
    check_elbo,
    check_maps,
    exact_elbo,
    unit_covariance,
    zero_network,
)


@checked_fields
class LinearCVAE(eqx.Module):
    r"""The unknowns of a linear conditional VAE; `covariance` and
    `log_decoder_variance` as in `LinearVAE`."""

    encoder_x: AbstractLinearNetwork
    encoder_y: AbstractLinearNetwork
    decoder: AbstractLinearNetwork
    skip: AbstractLinearNetwork
    covariance: AbstractCovariance | None = None
    log_decoder_variance: Scalar | None = None

    @classmethod
    def zeros(
        cls,
        x: int,
        y: int,
        latent: int,
        *,
        covariance: str | None = "full",
        learn_decoder: bool = False,
        hidden: tuple[tuple[int, ...], ...] = ((), (), (), ()),
    ) -> "LinearCVAE":
        """Maps that are zero, and unit variances, as `LinearVAE.zeros`; `hidden` are
        the widths inside `encoder_x`, `encoder_y`, `decoder` and `skip`."""
        return cls(
            zero_network((x, *hidden[0], latent)),
            zero_network((y, *hidden[1], latent)),
            zero_network((latent, *hidden[2], y)),
            zero_network((x, *hidden[3], y)),
            unit_covariance(covariance, latent),
            jnp.zeros(()) if learn_decoder else None,
        )


@checked_fields
class ConditionalELBO(AbstractEnergy[LinearCVAE]):
    r"""The conditional $\beta$-VAE's exact loss, up to constants: with $\mu = W_1 x +
    W_2 y$,

    $$L = \frac{1}{\eta^2} \mathbb{E}\|U_1 \mu + U_2 x - y\|^2 + \frac{1}{\eta^2}
    \mathrm{tr}((U_1^\top U_1 + \beta c^2) \Sigma) + \frac{\beta}{e^2}
    \mathbb{E}\|\mu\|^2 - \beta \log|\Sigma|,$$

    with $D_2 \log \eta^2$ added where $\eta$ is learned; $D_2$ is the dimension of y.
    The constants of `elbo` and the arguments are those of `NegativeELBO`.

    **Raises:** as `NegativeELBO`.
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

    def __call__(self, point: LinearCVAE) -> Scalar:
        encoder_x, encoder_y = point.encoder_x.matrix(), point.encoder_y.matrix()
        decoder, skip = point.decoder.matrix(), point.skip.matrix()
        xx, xy, yy = self.moments.xx, self.moments.xy, self.moments.yy
        latent = len(encoder_x)
        check_maps(
            encoder_x=(encoder_x.shape, (None, len(xx))),
            encoder_y=(encoder_y.shape, (latent, len(yy))),
            decoder=(decoder.shape, (len(yy), latent)),
            skip=(skip.shape, (len(yy), len(xx))),
        )
        # E[mu x^T] and E[mu y^T]: everything passes through the narrow latent space,
        # but for what the skip path alone leaves of y.
        code_x = encoder_x @ xx + encoder_y @ xy.T
        code_y = encoder_x @ xy + encoder_y @ yy
        code = code_x @ encoder_x.T + code_y @ encoder_y.T
        inner = decoder.T @ decoder
        left = jnp.trace(yy) - 2 * jnp.sum(skip * xy.T) + jnp.sum((skip @ xx) * skip)
        across = jnp.sum((decoder.T @ skip) * code_x) - jnp.sum(decoder.T * code_y)
        residual = left + 2 * across + jnp.sum(inner * code)
        return assembled(self, point, len(yy), residual, inner, code)

    def elbo(self, point: LinearCVAE) -> Scalar:
        r"""The mean over samples of
        $\mathbb{E}_q \log p(y \mid z, x) - \beta\, \mathrm{KL}(q \| p(z))$."""
        latent = point.decoder.matrix().shape[1]
        return exact_elbo(self, point, len(self.moments.yy), latent)
