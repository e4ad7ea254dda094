"""Factor analysis for practitioners, with the methods and names of
`sklearn.decomposition.FactorAnalysis`: fit, transform, score."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .arguments import check_one_of, check_range, check_whole
from .em import ExpandedMaximization, Squarem
from .iterate import iterate
from .models.factor import LatentGaussian, NegativeLogLikelihood
from .moments import Moments
from .noise import Diagonal
from .solution import failure_text, RESULTS, Solution
from .theory.ppca import PPCATheory


NOISES = ("diagonal", "isotropic")
ROTATIONS = (None, "varimax", "quartimax")
# Of a rotation: iterations, and the relative gain to stop at.
MOST_TURNS = 1000
TURNED = 1e-12


class HeywoodWarning(UserWarning):
    """A noise variance is at its floor: without one it would be 0, and the likelihood
    without bound or its optimum at the edge of the model."""


class ConvergenceWarning(UserWarning):
    """The steps were used up before the fit came to rest."""


class FactorAnalysis:
    r"""$x = \mu + Wz + \varepsilon$ with $z \sim N(0, I)$ and uncorrelated noise, by
    maximum likelihood.

    Takes the place of scikit-learn's class of that name; the start is not random, so
    there is no `random_state`, and the fit is exact, so there is no `svd_method`.

    **Arguments:**

    - `n_components`: the number of latent variables; `None`: that of the variables.
    - `noise`: "diagonal", or "isotropic", which is probabilistic PCA (closed form).
    - `rotation`: "varimax", "quartimax" or `None`: $W^\top\Psi^{-1}W$ is diagonal.
    - `tol`: stop at a step that adds no more to the average log-likelihood.
    - `max_iter`: steps, of three EM updates each.
    - `noise_variance_init`: of each variable, to start from.
    - `floor`: the least noise, relative to the variance of its variable.

    After `fit`: `components_` ($W^\top$), `noise_variance_`, `mean_`, `n_iter_`,
    `n_features_in_`, `heywood_` (which variables' noise is at its floor), `loglike_`
    (of all samples), and `point_`, `energy_` and `solution_` for the rest of gradflow.

    **Raises:** `ValueError` for arguments and data out of range.
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        noise: str = "diagonal",
        rotation: str | None = None,
        tol: float | int = 1e-12,
        max_iter: int = 10_000,
        noise_variance_init: Any = None,
        floor: float = 1e-6,
    ):
        self.n_components = n_components
        self.noise = noise
        self.rotation = rotation
        self.tol = tol
        self.max_iter = max_iter
        self.noise_variance_init = noise_variance_init
        self.floor = floor

    def fit(self, X: Any, y: Any = None) -> "FactorAnalysis":
        """Fits to data whose rows are samples; `y` is ignored.

        **Warns:** `HeywoodWarning`, `ConvergenceWarning`."""
        del y
        with jax.enable_x64(True):
            moments = Moments.from_data(X, center=True)
            self.mean_ = np.asarray(X, dtype=float).mean(axis=0)
            self.n_features_in_ = len(self.mean_)
            latents = self._checked()
            energy = NegativeLogLikelihood(moments, None, self.floor)
            solution = None
            if self.noise == "isotropic":
                point = PPCATheory(energy, latents).optimum()
            else:
                solution = self._iterated(energy, latents)
                point = solution.point
            point = LatentGaussian(jnp.asarray(self._turned(point)), point.noise)
            self.energy_, self.point_, self.solution_ = energy, point, solution
            self.components_ = np.asarray(point.loadings).T
            self.noise_variance_ = np.array(jnp.diagonal(point.noise.matrix()))
            self.heywood_ = np.asarray(energy.at_bounds(point)["heywood"])
            self.n_iter_ = 0 if solution is None else int(solution.stats["steps"])
            self.loglike_ = -float(energy(point)) * moments.count
        if self.heywood_.any():
            warnings.warn(
                heywood_text(self.heywood_, self.floor), HeywoodWarning, stacklevel=2
            )
        if solution is not None and solution.result == RESULTS.max_steps_reached:
            warnings.warn(
                f"max_iter={self.max_iter} steps used, the last of length "
                f"{float(solution.speed):.3g}: raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The posterior means of $z$, a row for each sample."""
        with jax.enable_x64(True):
            x = self._centred(X)
            return np.array(self.point_.posterior(x)[0])

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """`fit`, then `transform` of the same data."""
        return self.fit(X, y).transform(X)

    def score_samples(self, X: Any) -> np.ndarray:
        """The log-likelihood of each sample."""
        with jax.enable_x64(True):
            x = self._centred(X)
            return np.array(self.point_.log_density(x))

    def score(self, X: Any, y: Any = None) -> float:
        """The average log-likelihood; `y` is ignored."""
        del y
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, seed: int = 0) -> np.ndarray:
        """Draws from the fitted model, a row each."""
        self._check_fitted()
        with jax.enable_x64(True):
            return np.array(self.point_.sample(jr.key(seed), n_samples)) + self.mean_

    def get_covariance(self) -> np.ndarray:
        r"""$WW^\top + \Psi$."""
        self._check_fitted()
        return self.components_.T @ self.components_ + np.diag(self.noise_variance_)

    def get_precision(self) -> np.ndarray:
        """The inverse of the covariance."""
        self._check_fitted()
        with jax.enable_x64(True):
            mean_map, _ = self.point_.posterior_map()
            left = jnp.eye(self.n_features_in_) - self.point_.loadings @ mean_map
            return np.array(self.point_.noise.solve(left))

    def bic(self) -> float:
        """Of the data that it was fitted to; less is better."""
        self._check_fitted()
        with jax.enable_x64(True):
            return float(self.energy_.bic(self.point_))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, by name."""
        del deep
        return {name: getattr(self, name) for name in _ARGUMENTS}

    def set_params(self, **params: Any) -> "FactorAnalysis":
        """Changes arguments. **Raises:** `ValueError` for an unknown one."""
        for name, value in params.items():
            if name not in _ARGUMENTS:
                raise ValueError(f"{name} is no argument: {', '.join(_ARGUMENTS)} are")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        usual = FactorAnalysis()
        changed = (
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if np.any(value != getattr(usual, name))
        )
        return f"FactorAnalysis({', '.join(changed)})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "point_")

    def __sklearn_tags__(self) -> Any:
        """For scikit-learn's pipelines and searches, which alone call it: a transformer
        without a target. A base class of its own would make it a dependency."""
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags(None, TargetTags(required=False), TransformerTags())

    def _checked(self) -> int:
        for name, allowed in (("noise", NOISES), ("rotation", ROTATIONS)):
            check_one_of(name, getattr(self, name), allowed)
        check_range("tol", self.tol)
        check_whole("max_iter", self.max_iter)
        latents = self.n_components
        if latents is None:
            return self.n_features_in_
        whole = isinstance(latents, (int, np.integer)) and not isinstance(latents, bool)
        if not whole or not 1 <= latents <= self.n_features_in_:
            raise ValueError(
                f"n_components must be a whole number from 1 to {self.n_features_in_}, "
                f"the number of variables, got {latents!r}"
            )
        return int(latents)

    def _iterated(self, energy: NegativeLogLikelihood, latents: int) -> Solution:
        """From half of each variance as noise and the principal directions of the rest,
        or from the noise that is given."""
        scales = jnp.diagonal(energy.covariance)
        variances = 0.5 * scales
        if self.noise_variance_init is not None:
            given = np.asarray(self.noise_variance_init)
            if given.dtype.kind not in "iuf":
                raise ValueError(
                    f"noise_variance_init must be real numbers, got {given.dtype}"
                )
            given = given.astype(float)
            if given.shape != scales.shape:
                raise ValueError(
                    f"noise_variance_init has shape {given.shape}: give one number for "
                    f"each of the {self.n_features_in_} variables"
                )
            variances = given
        noise = Diagonal.of(variances)
        white = noise.whiten(noise.whiten(energy.covariance).T)
        values, vectors = jnp.linalg.eigh(white)
        excess = jnp.sqrt(jnp.maximum(values[-latents:] - 1, 0.01))
        loadings = noise.color(vectors[:, -latents:] * excess[None, :])
        solution = iterate(
            Squarem(ExpandedMaximization(energy)),
            LatentGaussian(loadings, noise),
            gain=float(self.tol),
            max_steps=self.max_iter,
            throw=False,
        )
        fine = (RESULTS.successful, RESULTS.max_steps_reached)
        if not any(bool(solution.result == member) for member in fine):
            raise RuntimeError(failure_text(solution))
        return solution

    def _turned(self, point: LatentGaussian) -> np.ndarray:
        """The loadings in the basis asked for, each column's largest entry positive."""
        loadings = np.asarray(point.loadings)
        white = np.asarray(point.noise.whiten(point.loadings))
        loadings = loadings @ np.linalg.svd(white, full_matrices=False)[2].T
        if self.rotation is not None:
            loadings = rotate(loadings, self.rotation)
        largest = np.argmax(np.abs(loadings), axis=0)
        signs = np.sign(loadings[largest, np.arange(loadings.shape[1])])
        return loadings * np.where(signs == 0, 1, signs)

    def _check_fitted(self) -> None:
        if not hasattr(self, "point_"):
            raise ValueError("this FactorAnalysis is not fitted yet: call fit first")

    def _centred(self, X: Any):
        self._check_fitted()
        x = np.asarray(X, dtype=float)
        if x.ndim != 2 or x.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has shape {x.shape}: give rows of {self.n_features_in_} numbers, "
                "as in fit"
            )
        if not np.isfinite(x).all():
            row, column = np.argwhere(~np.isfinite(x))[0]
            raise ValueError(
                f"X has {np.sum(~np.isfinite(x))} non-finite values, first at [{row}, "
                f"{column}]: drop those rows or fill them in"
            )
        return jnp.asarray(x - self.mean_)


_ARGUMENTS = (
    "n_components",
    "noise",
    "rotation",
    "tol",
    "max_iter",
    "noise_variance_init",
    "floor",
)


def heywood_text(flags: Any, floor: float) -> str:
    """One sentence on the variables whose noise is at its floor."""
    places = np.flatnonzero(flags)
    listed = ", ".join(f"x[{j}]" for j in places[:10]) + ", ..." * (places.size > 10)
    return (
        f"noise variance of {listed} reached its floor {floor:g} (Heywood case): the "
        "model explains all of it; take fewer latent variables, drop repeated "
        "variables or use more samples"
    )


def rotate(loadings: np.ndarray, method: str) -> np.ndarray:
    r"""Loadings turned so that $\sum_{pk} w_{pk}^4$ is largest ("quartimax"), less, for
    "varimax", $\frac1P \sum_k (\sum_p w_{pk}^2)^2$.

    *Reference:* Kaiser (1958), in the form of repeated polar decompositions."""
    rotation, before = np.eye(loadings.shape[1]), 0.0
    weight = 1 / len(loadings) if method == "varimax" else 0.0
    for _ in range(MOST_TURNS):
        turned = loadings @ rotation
        slope = turned**3 - weight * turned * np.sum(turned**2, axis=0)
        left, values, right = np.linalg.svd(loadings.T @ slope)
        rotation = left @ right
        if values.sum() < before * (1 + TURNED):
            break
        before = values.sum()
    return loadings @ rotation
