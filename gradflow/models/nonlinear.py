r"""Conditional and hierarchical VAEs whose maps are multilayer perceptrons.

| on paper | in code |
|---|---|
| $q(z \mid x, y) = N(\mu, \mathrm{diag}\, s)$, both of x, y | `NonlinearCVAE.encoder` |
| $p(y \mid z, x) = N(g(z, x), \eta^2 1)$ | `decoder`, `decoder_std` |
| $q(z_1 \mid x), q(z_2 \mid z_1)$ | `NonlinearHVAE.encoder_1`, `encoder_2` |
| $p(z_1 \mid z_2), p(x \mid z_1)$, both with $\eta^2 1$ | `decoder_2`, `decoder_1` |
| $p(z) = N(0, e^2 1)$, of $z_2$ with two levels | `prior_std` |

They have no twin in `theory`: no optimum is known in closed form. Nor is the ELBO, so
it is sampled by $z = \mu + \sqrt{s}\,\epsilon$, which lets gradients through; of the
rest what has a closed form is not sampled. With perceptrons of depth 0, which are
affine, its mean is the exact ELBO of `cvae.py` and `hvae.py`.

Functions are of one sample: use `jax.vmap` for many.

*Reference:* Dang, Tran, Nguyen, Ho 2023, section 5, which trains such networks; Kingma,
Welling, *Auto-encoding variational Bayes* (2014).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from ..arguments import checked_fields
from ..types import Key, Scalar
from .base import as_array, check_positive
from .vae import check_maps, gaussian_kl


@checked_fields
class NonlinearCVAE(eqx.Module):
    r"""The unknowns of a conditional VAE: `encoder` takes x and y to the means and the
    log-variances of z, `decoder` takes z and x to the mean of y."""

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP

    @classmethod
    def random(
        cls, x: int, y: int, latent: int, *, width: int, depth: int, key: Key
    ) -> "NonlinearCVAE":
        """Equinox's initial weights. `depth`: of hidden layers of `width`; 0 for affine
        maps."""
        one, two = jr.split(key)
        return cls(
            _perceptron(x + y, 2 * latent, width, depth, one),
            _perceptron(latent + x, y, width, depth, two),
        )


@checked_fields
class NonlinearHVAE(eqx.Module):
    r"""The unknowns of a hierarchical VAE. `encoder_1` has log-variances too unless the
    energy holds a fixed `encoder_std`; `encoder_2` always has."""

    encoder_1: eqx.nn.MLP
    encoder_2: eqx.nn.MLP
    decoder_1: eqx.nn.MLP
    decoder_2: eqx.nn.MLP

    @classmethod
    def random(
        cls,
        x: int,
        latent_1: int,
        latent_2: int,
        *,
        width: int,
        depth: int,
        key: Key,
        learn_first: bool = False,
    ) -> "NonlinearHVAE":
        """As `NonlinearCVAE.random`. `learn_first`: the variance of $q(z_1 \\mid x)$
        too."""
        keys = jr.split(key, 4)
        first = 2 * latent_1 if learn_first else latent_1
        sizes = (
            (x, first), (latent_1, 2 * latent_2), (latent_1, x), (latent_2, latent_1)
        )  # fmt: skip
        return cls(
            *(
                _perceptron(*size, width, depth, own)
                for size, own in zip(sizes, keys, strict=True)
            )
        )


@checked_fields
class SampledConditionalELBO(eqx.Module):
    r"""The $\beta$-ELBO of a conditional VAE for one sample,

    $$\log p(y \mid z, x) - \beta\, \mathrm{KL}(q(z \mid x, y) \| p(z)),$$

    with one $z$ drawn from $q$.

    **Raises:** `ValueError` for numbers that are not finite and > 0, and maps whose
    sizes don't fit.
    """

    beta: float | Scalar = eqx.field(default=1.0, converter=as_array)
    decoder_std: float | Scalar = eqx.field(default=1.0, converter=as_array)
    prior_std: float | Scalar = eqx.field(default=1.0, converter=as_array)

    def __check_init__(self):
        for name in ("beta", "decoder_std", "prior_std"):
            check_positive(name, getattr(self, name))

    def elbo(
        self,
        point: NonlinearCVAE,
        x: Float[Array, " x"],
        y: Float[Array, " y"],
        *,
        key: Key,
    ) -> Scalar:
        """An unbiased estimate."""
        means, logs = self.code(point, x, y)
        z = _drawn(means, logs, key)
        mean = point.decoder(jnp.concatenate([z, x]))
        divergence = gaussian_kl(jnp.exp(logs), means**2, self.prior_std**2)
        return _log_density(y - mean, self.decoder_std) - self.beta * divergence.sum()

    def kl(
        self, point: NonlinearCVAE, x: Float[Array, " x"], y: Float[Array, " y"]
    ) -> Float[Array, " latent"]:
        r"""$\mathrm{KL}(q(z_i \mid x, y) \| p(z_i))$ of each latent, exact."""
        means, logs = self.code(point, x, y)
        return gaussian_kl(jnp.exp(logs), means**2, self.prior_std**2)

    def code(
        self, point: NonlinearCVAE, x: Float[Array, " x"], y: Float[Array, " y"]
    ) -> tuple[Float[Array, " latent"], Float[Array, " latent"]]:
        """Means and log-variances of z."""
        latent = _latent("encoder", point.encoder)
        _check(
            encoder=(point.encoder, (2 * latent, x.size + y.size)),
            decoder=(point.decoder, (y.size, latent + x.size)),
        )
        return _halves(point.encoder(jnp.concatenate([x, y])))


@checked_fields
class SampledHierarchicalELBO(eqx.Module):
    r"""The ELBO of a hierarchical VAE for one sample, with $z_1$ and then $z_2$ drawn,

    $$\log p(x \mid z_1) - \beta_1 (\log q(z_1 \mid x) - \log p(z_1 \mid z_2))
    - \beta_2\, \mathrm{KL}(q(z_2 \mid z_1) \| p(z_2)).$$

    `encoder_std`: of $q(z_1 \mid x)$ where it is fixed. Where it is learned the loss is
    unbounded below for $\beta_2 < \beta_1$, as that of linear maps is, of which these
    are more.

    **Raises:** as `SampledConditionalELBO`.
    """

    beta_1: float | Scalar = eqx.field(default=1.0, converter=as_array)
    beta_2: float | Scalar = eqx.field(default=1.0, converter=as_array)
    decoder_std: float | Scalar = eqx.field(default=1.0, converter=as_array)
    prior_std: float | Scalar = eqx.field(default=1.0, converter=as_array)
    encoder_std: float | Scalar | None = eqx.field(default=None, converter=as_array)

    def __check_init__(self):
        for name in ("beta_1", "beta_2", "decoder_std", "prior_std", "encoder_std"):
            if name != "encoder_std" or self.encoder_std is not None:
                check_positive(name, getattr(self, name))

    def elbo(self, point: NonlinearHVAE, x: Float[Array, " x"], *, key: Key) -> Scalar:
        """An unbiased estimate."""
        z_1, kl_1, kl_2 = self._levels(point, x, key)
        likelihood = _log_density(x - point.decoder_1(z_1), self.decoder_std)
        return likelihood - self.beta_1 * kl_1.sum() - self.beta_2 * kl_2.sum()

    def kl(
        self, point: NonlinearHVAE, x: Float[Array, " x"], *, key: Key
    ) -> tuple[Float[Array, " latent_1"], Float[Array, " latent_2"]]:
        r"""Unbiased estimates, for each latent of both levels, of
        $\mathbb{E}_q [\log q(z_1 \mid x) - \log p(z_1 \mid z_2)]$ and
        $\mathbb{E}_q \mathrm{KL}(q(z_2 \mid z_1) \| p(z_2))$."""
        _, kl_1, kl_2 = self._levels(point, x, key)
        return kl_1, kl_2

    def code_1(
        self, point: NonlinearHVAE, x: Float[Array, " x"]
    ) -> tuple[Float[Array, " latent_1"], Float[Array, " latent_1"]]:
        """Means and log-variances of $z_1$ given x."""
        first, second = point.decoder_1.in_size, _latent("encoder_2", point.encoder_2)
        out = first if self.encoder_std is not None else 2 * _whole(first)
        _check(
            encoder_1=(point.encoder_1, (out, x.size)),
            encoder_2=(point.encoder_2, (2 * second, first)),
            decoder_1=(point.decoder_1, (x.size, first)),
            decoder_2=(point.decoder_2, (first, second)),
        )
        if self.encoder_std is None:
            return _halves(point.encoder_1(x))
        means = point.encoder_1(x)
        return means, jnp.full_like(means, 2 * jnp.log(self.encoder_std))

    def code_2(
        self, point: NonlinearHVAE, z_1: Float[Array, " latent_1"]
    ) -> tuple[Float[Array, " latent_2"], Float[Array, " latent_2"]]:
        """Means and log-variances of $z_2$ given $z_1$."""
        return _halves(point.encoder_2(z_1))

    def _levels(self, point, x, key):
        one, two = jr.split(key)
        means_1, logs_1 = self.code_1(point, x)
        z_1 = _drawn(means_1, logs_1, one)
        means_2, logs_2 = self.code_2(point, z_1)
        z_2 = _drawn(means_2, logs_2, two)
        # The mean of log q(z_1 | x) is known; z_2 depends on z_1, so that of
        # log p(z_1 | z_2) is not.
        variance = self.decoder_std**2
        left = (z_1 - point.decoder_2(z_2)) ** 2
        own = jnp.exp(logs_1)
        kl_1 = gaussian_kl(own, left - own, variance)
        return z_1, kl_1, gaussian_kl(jnp.exp(logs_2), means_2**2, self.prior_std**2)


def _perceptron(inputs: int, outputs: int, width: int, depth: int, key: Key):
    return eqx.nn.MLP(inputs, outputs, width, depth, activation=jax.nn.relu, key=key)


def _drawn(means, logs, key):
    return means + jnp.exp(logs / 2) * jr.normal(key, means.shape, means.dtype)


def _log_density(residual, std):
    r"""Of $N(0, \mathrm{std}^2 1)$."""
    constant = 2 * jnp.log(std) + float(np.log(2 * np.pi))
    return -0.5 * (jnp.sum(residual**2) / std**2 + residual.size * constant)


def _halves(output):
    latent = output.size // 2
    return output[:latent], output[latent:]


def _whole(size) -> int:
    # A perceptron's size may also be "scalar".
    return size if isinstance(size, int) else 1


def _latent(name: str, encoder: eqx.nn.MLP) -> int:
    size = _whole(encoder.out_size)
    if size % 2:
        raise ValueError(
            f"{name} has {size} outputs, an odd number: it must have a mean and a "
            "log-variance for each latent"
        )
    return size // 2


def _check(**maps) -> None:
    check_maps(
        **{
            name: ((_whole(mlp.out_size), _whole(mlp.in_size)), wanted)
            for name, (mlp, wanted) in maps.items()
        }
    )
