r"""How far the posterior has collapsed onto the prior, latent by latent.

Means over the data are closed forms of moments; (epsilon, delta)-collapse is about a
share of samples, so it wants the samples. Latents are the coordinates of z. Where only
a subspace is meant (a full covariance lets the minimum turn), `turned` gives the point
in coordinates where the decoder's columns are orthogonal, largest first.

*Reference:* Dang et al. 2023, sections 2 and 5 (D_MA); Lucas, Tucker, Grosse, Norouzi,
*Don't blame the ELBO!* (2019), definition 1 ((epsilon, delta)-collapse); Burda, Grosse,
Salakhutdinov, *Importance weighted autoencoders* (2015), section 5 (active units).
"""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .arguments import check_range, check_sides, checked_arguments
from .models.cvae import ConditionalELBO, LinearCVAE
from .models.hvae import HierarchicalELBO, LinearHVAE
from .models.linear import LinearMap
from .models.vae import (
    encoder_covariance,
    gaussian_kl,
    learned_or_fixed,
    LinearVAE,
    NegativeELBO,
    RootCovariance,
)
from .types import Scalar


# What the literature calls an active unit varies by more than this over the data.
ACTIVE = 1e-2
ELBO = NegativeELBO | ConditionalELBO | HierarchicalELBO
VAE = LinearVAE | LinearCVAE | LinearHVAE


@checked_arguments
def code(energy: ELBO, point: VAE) -> Float[Array, "latent latent"]:
    r"""$\mathbb{E} \mu \mu^\top$, the second moment of the posterior means of z (of
    $z_1$ in a hierarchical VAE) over the data."""
    moments = energy.moments
    if isinstance(point, LinearCVAE):
        from_x, from_y = point.encoder_x.matrix(), point.encoder_y.matrix()
        across = from_x @ moments.xy @ from_y.T
        return (
            from_x @ moments.xx @ from_x.T
            + from_y @ moments.yy @ from_y.T
            + across
            + across.T
        )
    encoder = point.encoder_1 if isinstance(point, LinearHVAE) else point.encoder
    return encoder.matrix() @ moments.xx @ encoder.matrix().T


@checked_arguments
def kl(
    energy: NegativeELBO | ConditionalELBO, point: LinearVAE | LinearCVAE
) -> Float[Array, " latent"]:
    r"""The mean over the data of $\mathrm{KL}(q(z_i \mid x) \| p(z_i))$ for each
    latent: $\frac12 (s_i + \mathbb{E}\mu_i^2) / e^2 - \frac12 - \frac12
    \log(s_i / e^2)$ with $s_i = \Sigma_{ii}$.

    Their sum is the whole divergence where $\Sigma$ is diagonal, and below it else.
    """
    second = code(energy, point)
    covariance, _ = encoder_covariance(energy, point, len(second))
    return gaussian_kl(
        jnp.diagonal(covariance), jnp.diagonal(second), energy.prior_std**2
    )


@checked_arguments
def kl_hierarchical(
    energy: HierarchicalELBO, point: LinearHVAE
) -> tuple[Float[Array, " latent_1"], Float[Array, " latent_2"]]:
    r"""The same for both levels: of $q(z_1 \mid x)$ from $p(z_1 \mid z_2)$, averaged
    over $z_2$ too, and of $q(z_2 \mid z_1)$ from $p(z_2)$, averaged over $z_1$."""
    encoder_2, decoder_2 = point.encoder_2.matrix(), point.decoder_2.matrix()
    latent_1, latent_2 = decoder_2.shape
    sigma_1, _ = learned_or_fixed(
        "covariance_1", point.covariance_1, energy.covariance_1, latent_1
    )
    sigma_2, _ = learned_or_fixed(
        "covariance_2", point.covariance_2, energy.covariance_2, latent_2
    )
    first = code(energy, point)
    second = encoder_2 @ (first + sigma_1) @ encoder_2.T
    missed = decoder_2 @ encoder_2 - jnp.eye(latent_1, dtype=first.dtype)
    # Of z_1 - U_2 z_2, and of z_1 given x.
    left = missed @ (first + sigma_1) @ missed.T + decoder_2 @ sigma_2 @ decoder_2.T
    own = jnp.diagonal(sigma_1)
    return (
        gaussian_kl(own, jnp.diagonal(left) - own, energy.decoder_std**2),
        gaussian_kl(jnp.diagonal(sigma_2), jnp.diagonal(second), energy.prior_std**2),
    )


@checked_arguments
def kl_samples(
    energy: NegativeELBO | ConditionalELBO,
    point: LinearVAE | LinearCVAE,
    *data: Float[Array, "samples _"],
) -> Float[Array, "samples latent"]:
    r"""$\mathrm{KL}(q(z_i \mid x) \| p(z_i))$ for each sample and latent; `data` are
    the rows of x, or of x and of y for a conditional VAE."""
    conditional = isinstance(point, LinearCVAE)
    if len(data) != (2 if conditional else 1):
        wanted = "the rows of x and of y" if conditional else "the rows of x"
        raise ValueError(f"data are {len(data)} arrays: give {wanted}")
    encoders = (point.encoder_x, point.encoder_y) if conditional else (point.encoder,)
    sizes = tuple(encoder.matrix().shape[1] for encoder in encoders)
    if tuple(rows.shape[1] for rows in data) != sizes:
        raise ValueError(
            f"data have {tuple(rows.shape[1] for rows in data)} columns: the encoders "
            f"take {sizes}"
        )
    codes = [
        rows @ encoder.matrix().T for rows, encoder in zip(data, encoders, strict=True)
    ]
    means = codes[0] + codes[1] if conditional else codes[0]
    covariance, _ = encoder_covariance(energy, point, means.shape[1])
    own = jnp.broadcast_to(jnp.diagonal(covariance)[None, :], means.shape)
    return gaussian_kl(own, means**2, energy.prior_std**2)


@checked_arguments
def is_collapsed(
    divergences: Float[Array, "samples latent"], epsilon: float, delta: float
) -> Bool[Array, " latent"]:
    r"""(epsilon, delta)-collapse: which latents have $\mathrm{KL}(q(z_i \mid x) \|
    p(z_i)) < \epsilon$ for at least a share $1 - \delta$ of the samples.

    **Raises:** `ValueError` unless epsilon > 0 and 0 <= delta < 1.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}")
    _check_delta(delta)
    check_sides("divergences", divergences)
    return jnp.mean(divergences < epsilon, axis=0) >= 1 - delta


@checked_arguments
def collapse_level(
    divergences: Float[Array, "samples latent"], delta: float
) -> Float[Array, " latent"]:
    r"""For each latent the $\epsilon$ above which it is (epsilon, delta)-collapsed: of
    n samples' divergences the $\lceil (1 - \delta) n \rceil$-th, smallest first.

    **Raises:** `ValueError` unless 0 <= delta < 1.
    """
    _check_delta(delta)
    check_sides("divergences", divergences)
    count = len(divergences)
    # Not one more for what 1 - delta was rounded by.
    place = math.ceil((1 - delta) * count * (1 - 1e-12))
    return jnp.sort(divergences, axis=0)[max(place, 1) - 1]


@checked_arguments
def active_units(
    energy: ELBO, point: VAE, threshold: float = ACTIVE
) -> Bool[Array, " latent"]:
    r"""Which latents have $\mathbb{E}\mu_i^2$ above a threshold: for centered data,
    those whose posterior mean varies by that much."""
    check_range("threshold", threshold, open_end=False)
    return jnp.diagonal(code(energy, point)) > threshold


@checked_arguments
def spectra(energy: ELBO, point: VAE) -> dict[str, Float[Array, " latent"]]:
    r"""The singular values of decoders and of whitened encoders, and the eigenvalues of
    covariances, largest first: what `theory.spectra()` has of the minimum."""
    if isinstance(point, LinearHVAE):
        latent_1, latent_2 = point.decoder_2.matrix().shape
        sizes = {"covariance_1": latent_1, "covariance_2": latent_2}
        found = {
            name: _singular(getattr(point, name).matrix())
            for name in ("encoder_2", "decoder_1", "decoder_2")
        }
        # A decoder has as many values as it has latents, some of them 0.
        found["decoder_1"] = _padded(found["decoder_1"], latent_1)
        for name in ("encoder_2", "decoder_2"):
            found[name] = _padded(found[name], latent_2)
        found["encoder_1"] = _root(code(energy, point))
    else:
        second = code(energy, point)
        decoder = _singular(point.decoder.matrix())
        found = {"encoder": _root(second), "decoder": _padded(decoder, len(second))}
        sizes = {"covariance": len(second)}
    for name, size in sizes.items():
        matrix, _ = learned_or_fixed(
            name, getattr(point, name), getattr(energy, name), size
        )
        found[name] = jnp.linalg.eigvalsh(matrix)[::-1]
    return found


@checked_arguments
def spectral_distance(
    one: Float[Array, " values"], other: Float[Array, " others"]
) -> Scalar:
    r"""$D_{MA}$, the mean of $|a_i - b_i|$ over two spectra, both sorted.

    **Raises:** `ValueError` for spectra of different lengths.
    """
    if one.shape != other.shape:
        raise ValueError(
            f"one and other have {one.size} and {other.size} values: fill up the "
            "shorter one with zeros if it lacks them"
        )
    return jnp.mean(jnp.abs(jnp.sort(one) - jnp.sort(other)))


@checked_arguments
def turned(energy: ELBO, point: VAE) -> tuple[Any, Any]:
    r"""The energy and the point in coordinates of z (of $z_2$ in a hierarchical VAE)
    where $U^\top U$ is diagonal, largest first: an orthogonal change, which alters
    neither loss nor prior.

    The maps to and from z become single matrices, and a learned covariance a
    `RootCovariance`.
    """
    level = "_2" if isinstance(point, LinearHVAE) else ""
    down, covariance = "decoder" + level, "covariance" + level
    names = ("encoder_x", "encoder_y")
    names = names if isinstance(point, LinearCVAE) else ("encoder" + level,)
    decoder, own = getattr(point, down).matrix(), getattr(point, covariance)
    rotation = jnp.linalg.eigh(decoder.T @ decoder)[1][:, ::-1].T
    maps = [getattr(point, name).matrix() for name in names]
    point = eqx.tree_at(
        lambda p: [getattr(p, name) for name in (down, *names)],
        point,
        [LinearMap(decoder @ rotation.T), *(LinearMap(rotation @ m) for m in maps)],
    )
    if own is not None:
        factor = rotation @ RootCovariance.of(own.matrix()).factor
        point = eqx.tree_at(
            lambda p: getattr(p, covariance), point, RootCovariance(factor)
        )
    else:
        fixed = rotation @ getattr(energy, covariance) @ rotation.T
        energy = eqx.tree_at(lambda e: getattr(e, covariance), energy, fixed)
    return energy, point


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be at least 0 and below 1, got {delta}")


def _singular(matrix):
    return jnp.linalg.svd(matrix, compute_uv=False)


def _padded(values, size):
    kept = min(size, values.size)
    return jnp.zeros(size, values.dtype).at[:kept].set(values[:kept])


def _root(second):
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(second)[::-1], 0))
