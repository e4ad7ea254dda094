r"""Linear Markovian hierarchical variational autoencoders with two latents.

| on paper | in code |
|---|---|
| $q(z_1 \mid x) = N(W_1 x, \Sigma_1)$ | `encoder_1`, `covariance_1` |
| $q(z_2 \mid z_1) = N(W_2 z_1, \Sigma_2)$ | `encoder_2`, `covariance_2` |
| $p(z_1 \mid z_2) = N(U_2 z_2, \eta^2 1)$ | `decoder_2`, `decoder_std` |
| $p(x \mid z_1) = N(U_1 z_1, \eta^2 1)$ | `decoder_1`, `decoder_std` |
| $p(z_2) = N(0, e^2 1)$ | `prior_std` |
| $c = \eta / e$; $\beta_1, \beta_2$ | `beta_1`, `beta_2` |
| $A = \mathbb{E}\, x x^\top$ | `moments.xx` |

*Reference:* Dang, Tran, Nguyen, Ho 2023, section 4.2. *Erratum:* the prior
$N(0, e^2 1)$ is that of $z_2$, not of $z_1$.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arguments import checked_fields
from ..moments import Moments
from ..types import Scalar
from .base import AbstractEnergy, as_array, check_positive
from .linear import AbstractLinearNetwork
from .vae import (
    AbstractCovariance,
    check_covariance,
    check_maps,
    learned_or_fixed,
    unit_covariance,
    zero_network,
)


@checked_fields
class LinearHVAE(eqx.Module):
    r"""The unknowns of a linear hierarchical VAE. A covariance is `None` where the
    energy holds a fixed one."""

    encoder_1: AbstractLinearNetwork
    encoder_2: AbstractLinearNetwork
    decoder_1: AbstractLinearNetwork
    decoder_2: AbstractLinearNetwork
    covariance_1: AbstractCovariance | None = None
    covariance_2: AbstractCovariance | None = None

    @classmethod
    def zeros(
        cls,
        x: int,
        latent_1: int,
        latent_2: int,
        *,
        covariance_1: str | None = None,
        covariance_2: str | None = "full",
        hidden: tuple[tuple[int, ...], ...] = ((), (), (), ()),
    ) -> "LinearHVAE":
        """Maps that are zero, and unit variances, as `LinearVAE.zeros`; `hidden` are
        the widths inside `encoder_1`, `encoder_2`, `decoder_1` and `decoder_2`."""
        return cls(
            zero_network((x, *hidden[0], latent_1)),
            zero_network((latent_1, *hidden[1], latent_2)),
            zero_network((latent_1, *hidden[2], x)),
            zero_network((latent_2, *hidden[3], latent_1)),
            unit_covariance(covariance_1, latent_1),
            unit_covariance(covariance_2, latent_2),
        )


@checked_fields
class HierarchicalELBO(AbstractEnergy[LinearHVAE]):
    r"""The exact loss of a hierarchical VAE, up to constants: with
    $M = W_1 A W_1^\top + \Sigma_1$, the second moment of $z_1$, and $R = U_2 W_2 - 1$,

    $$L = \frac{1}{\eta^2} [\mathbb{E}\|U_1 W_1 x - x\|^2 + \mathrm{tr}(U_1^\top U_1
    \Sigma_1) + \beta_1 \mathrm{tr}(R^\top R M) + \beta_1 \mathrm{tr}(U_2^\top U_2
    \Sigma_2)] + \frac{\beta_2}{e^2} [\mathrm{tr}(W_2 M W_2^\top) + \mathrm{tr}\Sigma_2]
    - \beta_1 \log|\Sigma_1| - \beta_2 \log|\Sigma_2|.$$

    Twice the negative ELBO, per sample, is $L + D_0 \log 2\pi\eta^2 + \beta_1 d_1
    (\log \eta^2 - 1) + \beta_2 d_2 (\log e^2 - 1)$: see `elbo`. With both covariances
    learned it is unbounded below for $\beta_2 < \beta_1$.

    **Arguments:**

    - `moments`: of the data; only `xx` is used, and it may be singular.
    - `covariance_1`, `covariance_2`: $\Sigma_1$ and $\Sigma_2$ where they are fixed;
      `None` if the point has them.

    **Raises:** as `NegativeELBO`.
    """

    moments: Moments
    beta_1: float | Scalar = eqx.field(default=1.0, converter=as_array)
    beta_2: float | Scalar = eqx.field(default=1.0, converter=as_array)
    decoder_std: float | Scalar = eqx.field(default=1.0, converter=as_array)
    prior_std: float | Scalar = eqx.field(default=1.0, converter=as_array)
    covariance_1: Float[Array, "latent_1 latent_1"] | None = eqx.field(
        default=None, converter=as_array
    )
    covariance_2: Float[Array, "latent_2 latent_2"] | None = eqx.field(
        default=None, converter=as_array
    )

    def __check_init__(self):
        for name in ("beta_1", "beta_2", "decoder_std", "prior_std"):
            check_positive(name, getattr(self, name))
        for name in ("covariance_1", "covariance_2"):
            if getattr(self, name) is not None:
                check_covariance(name, getattr(self, name))

    def __call__(self, point: LinearHVAE) -> Scalar:
        encoder_1, encoder_2 = point.encoder_1.matrix(), point.encoder_2.matrix()
        decoder_1, decoder_2 = point.decoder_1.matrix(), point.decoder_2.matrix()
        xx = self.moments.xx
        latent_1, latent_2 = len(encoder_1), len(encoder_2)
        check_maps(
            encoder_1=(encoder_1.shape, (None, len(xx))),
            encoder_2=(encoder_2.shape, (None, latent_1)),
            decoder_1=(decoder_1.shape, (len(xx), latent_1)),
            decoder_2=(decoder_2.shape, (latent_1, latent_2)),
        )
        sigma_1, log_1 = learned_or_fixed(
            "covariance_1", point.covariance_1, self.covariance_1, latent_1
        )
        sigma_2, log_2 = learned_or_fixed(
            "covariance_2", point.covariance_2, self.covariance_2, latent_2
        )
        pushed = encoder_1 @ xx
        second = pushed @ encoder_1.T + sigma_1
        missed = decoder_2 @ encoder_2 - jnp.eye(latent_1, dtype=xx.dtype)
        reconstruction = (
            jnp.trace(xx)
            - 2 * jnp.sum(decoder_1.T * pushed)
            + jnp.sum((decoder_1.T @ decoder_1) * second)
        )
        between = jnp.sum((missed @ second) * missed) + jnp.sum(
            (decoder_2.T @ decoder_2) * sigma_2
        )
        prior = jnp.sum((encoder_2 @ second) * encoder_2) + jnp.trace(sigma_2)
        return (
            (reconstruction + self.beta_1 * between) / self.decoder_std**2
            + self.beta_2 / self.prior_std**2 * prior
            - self.beta_1 * log_1
            - self.beta_2 * log_2
        )

    def elbo(self, point: LinearHVAE) -> Scalar:
        r"""The mean over samples of $\mathbb{E}_q[\log p(x \mid z_1) - \beta_1 (\log
        q(z_1 \mid x) - \log p(z_1 \mid z_2)) - \beta_2 (\log q(z_2 \mid z_1) - \log
        p(z_2))]$."""
        latent_1, latent_2 = point.decoder_2.matrix().shape
        log_variance = 2 * jnp.log(self.decoder_std)
        constant = (
            len(self.moments.xx) * (log_variance + float(np.log(2 * np.pi)))
            + self.beta_1 * latent_1 * (log_variance - 1)
            + self.beta_2 * latent_2 * (2 * jnp.log(self.prior_std) - 1)
        )
        return -0.5 * (self(point) + constant)
