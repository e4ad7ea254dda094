r"""Problems of Gaussian latent variables: data, true or real, and where runs start.

Of two views each, so that all four models are about the same variables.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .. import datasets
from ..models.factor import battery_pattern, LatentGaussian, NegativeLogLikelihood
from ..moments import Moments
from ..noise import AbstractNoise, Block, Diagonal, Full, Isotropic
from ..types import Key


MODELS = ("ppca", "fa", "pcca", "ibfa")
# From scikit-learn; variables are scaled to variance 1.
TABLES = ("digits", "wine", "breast_cancer")
DATA = ("synthetic", *TABLES, "mnist")
# Of the synthetic data.
SAMPLES = 500
# What share of each variance a start takes for noise.
NOISE = 0.5


class Problem(NamedTuple):
    """One model of one data set: its energy, how runs start, and the true point where
    there is one."""

    energy: NegativeLogLikelihood
    start: "LatentInit"
    truth: LatentGaussian | None


class LatentInit(eqx.Module):
    """Independent Gaussian loadings of `scale` times each variable's deviation, beside
    half of each variance as noise."""

    energy: NegativeLogLikelihood
    noise: AbstractNoise
    latents: int = eqx.field(static=True)
    scale: float = 0.5

    def __call__(self, key: Key) -> LatentGaussian:
        deviations = jnp.sqrt(jnp.diagonal(self.energy.covariance))
        draws = jr.normal(key, (deviations.size, self.latents), deviations.dtype)
        point = LatentGaussian(self.scale * deviations[:, None] * draws, self.noise)
        return self.energy.held(point)


def problem(
    model: str,
    data: str,
    key: Key,
    *,
    variables: int,
    latents: int,
    private: int,
    scale: float = 0.5,
) -> Problem:
    """One of `MODELS` of one of `DATA`.

    - `variables`: of the synthetic data, or principal directions of MNIST's halves.
    - `latents`, `private`: shared latent variables, and those of each view (IBFA).

    **Raises:** `ValueError` for as many latent variables as there are variables, and if
    scikit-learn is needed and missing.
    """
    truth = None
    if data == "synthetic":
        sizes = (variables - variables // 2, variables // 2)
        truth = _truth(model, key, sizes, latents, private)
        x = truth.sample(jr.fold_in(key, 1), SAMPLES)
        moments = Moments.from_data(np.asarray(x), center=True)
    elif data == "mnist":
        moments, sizes = _mnist_halves(variables)
    else:
        moments, sizes = _table(data)
    if latents + 2 * private >= sum(sizes):
        raise ValueError(
            f"latents={latents} and private={private} are too many for the "
            f"{sum(sizes)} variables of data={data}: lower them"
        )
    pattern = None
    if model == "ibfa":
        pattern = battery_pattern(sizes, latents, (private, private))
        latents += 2 * private
    energy = NegativeLogLikelihood(moments, pattern)
    noise = _noise(model, NOISE * jnp.diagonal(energy.covariance), sizes)
    return Problem(energy, LatentInit(energy, noise, latents, scale), truth)


def _noise(model: str, variances: Any, sizes: tuple[int, int]) -> AbstractNoise:
    views = jnp.split(variances, [sizes[0]])
    match model:
        case "ppca":
            return Isotropic(jnp.log(jnp.mean(variances)), variances.size)
        case "fa":
            return Diagonal(jnp.log(variances))
        case "pcca":
            return Block(tuple(Full.of(jnp.diag(view)) for view in views))
        case _:
            logs = [jnp.log(jnp.mean(view)) for view in views]
            return Block(
                tuple(Isotropic(a, n) for a, n in zip(logs, sizes, strict=True))
            )


def _truth(model, key, sizes, latents, private) -> LatentGaussian:
    """Gaussian loadings, and noise of variances from 0.5 to 1.5."""
    first, second = jr.split(key)
    variances = jr.uniform(first, (sum(sizes),), minval=0.5, maxval=1.5)
    every = latents + (2 * private if model == "ibfa" else 0)
    loadings = jr.normal(second, (sum(sizes), every))
    if model == "ibfa":
        free = battery_pattern(sizes, latents, (private, private))
        loadings = jnp.where(jnp.asarray(free), loadings, 0)
    return LatentGaussian(loadings, _noise(model, variances, sizes))


def _table(name: str) -> tuple[Moments, tuple[int, int]]:
    """Two halves of the columns: of an image, its left and its right half."""
    try:
        from sklearn import datasets as tables
    except ImportError:
        raise ValueError(
            f"data={name} comes with scikit-learn, which is not installed: "
            "pip install 'gradflow[data]'"
        ) from None
    x = np.asarray(getattr(tables, f"load_{name}")(return_X_y=True)[0], float)
    if name == "digits":
        columns = np.arange(64).reshape(8, 8)
        first, second = columns[:, :4].ravel(), columns[:, 4:].ravel()
    else:
        first, second = np.split(np.arange(x.shape[1]), [x.shape[1] // 2])
    # Pixels that are lit in almost no image carry nothing.
    moving = x.std(axis=0) > 0
    first, second = first[moving[first]], second[moving[second]]
    kept = np.concatenate([first, second])
    scaled = (x[:, kept] - x[:, kept].mean(axis=0)) / x[:, kept].std(axis=0)
    return Moments.from_data(scaled, center=True), (len(first), len(second))


def _mnist_halves(variables: int) -> tuple[Moments, tuple[int, int]]:
    """The left and the right half of the images, each by its leading principal
    directions; about the origin, as MNIST's moments are, so that the mean is a latent
    direction."""
    whole = datasets.mnist()
    columns = np.arange(784).reshape(28, 28)
    halves = (columns[:, :14].ravel(), columns[:, 14:].ravel())
    sizes = (variables - variables // 2, variables // 2)
    bases = []
    for half, size in zip(halves, sizes, strict=True):
        own = whole.xx[np.ix_(half, half)]
        view = Moments(own, own, own, whole.count, autoencoding=True)
        bases.append(view.principal()[1][:, :size])
    basis = jax.scipy.linalg.block_diag(*bases)
    order = np.concatenate(halves)
    joint = basis.T @ whole.xx[np.ix_(order, order)] @ basis
    return Moments(joint, joint, joint, whole.count, autoencoding=True), sizes
