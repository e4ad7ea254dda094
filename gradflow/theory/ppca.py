r"""Probabilistic PCA: every critical point, and what kind it is.

| on paper | in code |
|---|---|
| $S = \sum_j \lambda_j u_j u_j^\top$ | `eigenvalues`, `vectors` |
| $J$, at most $K$ of these modes | `modes`, `latents` |

*Reference:* Tipping, Bishop (1999).
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..arguments import checked_arguments
from ..models.base import EnergyBelow
from ..models.factor import LatentGaussian, NegativeLogLikelihood
from ..noise import Isotropic
from ..spectrum import cutoff, eigh_descending
from ..types import Scalar
from .base import AbstractTheory, Match
from .modes import (
    below,
    check_free,
    check_latents,
    checked,
    escape,
    matched,
    nearest,
    subsets,
    TIE,
)


class PPCATheory(AbstractTheory[LatentGaussian]):
    r"""The critical points of probabilistic PCA with `latents` latent variables.

    They are $W = U_J (\Lambda_J - \sigma^2)^{1/2} R$ with $\sigma^2$ the mean of the
    eigenvalues outside of $J$, for every $J$ whose eigenvalues are all above that mean;
    all but the first $K$ are strict saddles.

    **Raises:** `ValueError` if the energy has a pattern, or $S$ no more than `latents`
    eigenvalues above 0: the likelihood is then unbounded.

    *Reference:* Tipping, Bishop 1999, section 3 and appendix A.
    """

    energy: NegativeLogLikelihood
    latents: int = eqx.field(static=True)
    eigenvalues: Float[Array, " modes"]
    vectors: Float[Array, "x modes"]

    @checked_arguments
    def __init__(self, energy: NegativeLogLikelihood, latents: int):
        check_free(energy)
        check_latents(latents)
        values, vectors = eigh_descending(energy.covariance)
        if not isinstance(values, jax.core.Tracer):
            least = cutoff(len(values), values.dtype) * values[0]
            rank = int(jnp.sum(values > least))
            if latents >= rank:
                raise ValueError(
                    f"latents={latents} but the covariance has rank {rank}: without "
                    "noise the likelihood is unbounded, so take fewer latent variables"
                )
        self.energy = energy
        self.latents = int(latents)
        self.eigenvalues, self.vectors = jnp.maximum(values, 0), vectors

    def spectrum(self) -> Float[Array, " modes"]:
        r"""$\lambda_1 \ge \lambda_2 \ge \dots$"""
        return self.eigenvalues

    def variance(self, modes: Sequence[int]) -> Scalar:
        r"""$\sigma^2$, the mean of the eigenvalues outside of $J$."""
        return self._variance(self._mask(modes))

    def critical_energy(self, modes: Sequence[int]) -> Scalar:
        r"""$\frac12 (P \log 2\pi + \sum_{j \in J} \log\lambda_j + (P - |J|)
        \log\sigma^2 + P)$."""
        return self._value(self._mask(modes))

    def optimal_energy(self) -> Scalar:
        """That of the first $K$ modes."""
        return self.critical_energy(range(self.latents))

    def optimum(self) -> LatentGaussian:
        """A global minimizer; the others are its rotations $WR$ (and, where
        $\\lambda_K = \\lambda_{K + 1}$, those within that eigenspace)."""
        return self.critical_point(range(self.latents))

    def critical_point(self, modes: Sequence[int]) -> LatentGaussian:
        r"""$U_J (\Lambda_J - \sigma^2)^{1/2}$ and columns of zeros.

        **Raises:** `ValueError` where an eigenvalue of $J$ is below $\sigma^2$: there
        is no such point."""
        kept = self._checked(modes)
        variance = self.variance(modes)
        excess = self.eigenvalues[kept] - variance
        slack = TIE * self.eigenvalues[0]
        if not isinstance(excess, jax.core.Tracer) and bool(jnp.any(excess < -slack)):
            raise ValueError(
                f"modes={tuple(modes)} leave noise of variance {float(variance):.4g}, "
                "more than one of their own: this is no critical point"
            )
        loadings = self.vectors[:, kept] * jnp.sqrt(jnp.maximum(excess, 0))[None, :]
        loadings = jnp.pad(loadings, ((0, 0), (0, self.latents - len(kept))))
        return LatentGaussian(loadings, Isotropic(jnp.log(variance), self.energy.size))

    def index_sets(self) -> list[tuple[int, ...]]:
        """Every $J$ that is a critical point, smallest first.

        **Raises:** `ValueError` where they are too many to list (over 100 000)."""
        return [modes for modes in subsets(self) if self._valid(modes)]

    def index(self, modes: Sequence[int]) -> int:
        r"""The number of negative eigenvalues of the Hessian at `critical_point`: one
        for each pair $j \in J$, $i \notin J$ with $\lambda_i > \lambda_j$, and for each
        column of zeros and $i \notin J$ with $\lambda_i > \sigma^2$."""
        kept = set(self._checked(modes).tolist())
        values = np.asarray(self.eigenvalues)
        slack = TIE * values[0]
        rest = [i for i in range(values.size) if i not in kept]
        swaps = sum(values[i] - values[j] > slack for i in rest for j in kept)
        above = sum(values[i] - float(self.variance(modes)) > slack for i in rest)
        return int(swaps + (self.latents - len(kept)) * above)

    @property
    def certificate(self) -> EnergyBelow[LatentGaussian]:
        """Whether the energy is below every critical value but the least.

        The second least is one exchange or one omission away from the first $K$ modes:
        from any other critical point such moves lead there, each to a critical point of
        less energy. The energy is bounded below and its level sets are compact, so that
        a flow (or EM) that never raises it ends at a critical point."""
        optimal = self.optimal_energy()
        values, kept = self.eigenvalues, jnp.arange(self.eigenvalues.size)
        first = kept < self.latents

        def after(inner, outer):
            mask = (first & (kept != inner)) | ((kept == outer) & (outer >= 0))
            variance = self._variance(mask)
            valid = jnp.min(jnp.where(mask, values, jnp.inf)) > variance
            gap = self._value(mask) - optimal
            return jnp.where(valid & (gap > TIE), gap, jnp.inf)

        inner = jnp.arange(self.latents)
        outer = jnp.append(jnp.arange(self.latents, values.size), -1)
        gaps = jax.vmap(lambda i: jax.vmap(lambda o: after(i, o))(outer))(inner)
        return below(self.energy, optimal, jnp.min(gaps))

    def active(self, point: LatentGaussian) -> Bool[Array, " modes"]:
        """The modes of the nearest critical point: those along which the loadings have
        more than half of what they have there."""
        variance = jnp.exp(self._noise(point).log_variance)
        along = jnp.sum((self.vectors.T @ point.loadings) ** 2, axis=1)
        excess = self.eigenvalues - variance
        share = jnp.where(excess > 0, along / jnp.where(excess > 0, excess, 1), 0)
        return nearest(share, self.eigenvalues) & (excess > 0)

    def match(self, point: LatentGaussian) -> Match:
        """How `point` compares with the critical points."""
        modes = self.active(point)
        variance = jnp.exp(self._noise(point).log_variance)
        gram = point.loadings.T @ point.loadings
        eye = jnp.eye(len(gram), dtype=gram.dtype)
        scores = jnp.linalg.solve(gram + variance * eye, point.loadings.T).T
        off = self.energy.covariance @ scores - point.loadings
        unit = jnp.sqrt(self.eigenvalues[0])
        off = jnp.maximum(
            jnp.linalg.norm(off) / unit,
            jnp.abs(variance / self._variance(modes) - 1),
        )
        values = jnp.linalg.svd(point.loadings, compute_uv=False)
        return matched(self, off, values, unit, modes, self._value(modes), point)

    def remaining(self, point: LatentGaussian) -> Scalar:
        r"""$\log(1/\text{distance})$ over the rate $(\lambda_i / k - 1) / \sigma^2$ of
        the fastest exchange; $k$ is $\lambda_j$ of the mode that goes, or $\sigma^2$
        where a column is idle."""
        modes = self.active(point)
        variance, values = self._variance(modes), self.eigenvalues
        best = jnp.max(jnp.where(modes, 0, values))
        worst = jnp.min(jnp.where(modes, values, jnp.inf))
        goes = jnp.where(jnp.sum(modes) < self.latents, variance, worst)
        rate = (best / goes - 1) / variance
        along = jnp.where(modes[:, None], 0, self.vectors.T @ point.loadings)
        far = jnp.linalg.norm(along) / jnp.sqrt(values[0])
        return escape(rate, far)

    def _mask(self, modes):
        mask = np.zeros(self.eigenvalues.shape, dtype=bool)
        mask[self._checked(modes)] = True
        return jnp.asarray(mask)

    def _variance(self, mask):
        rest = jnp.where(mask, 0, self.eigenvalues)
        return jnp.sum(rest) / self._left(mask)

    def _left(self, mask):
        return jnp.sum(jnp.where(mask, 0, jnp.ones_like(self.eigenvalues)))

    def _value(self, mask):
        kept = jnp.sum(jnp.log(jnp.where(mask, self.eigenvalues, 1)))
        left = self._left(mask) * jnp.log(self._variance(mask))
        constant = mask.size * (math.log(2 * math.pi) + 1)
        return 0.5 * (constant + kept + left)

    def _valid(self, modes):
        values = np.asarray(self.eigenvalues)
        rest = np.delete(values, list(modes)).mean()
        return all(values[j] - rest > TIE * values[0] for j in modes)

    def _checked(self, modes):
        return checked(modes, self.eigenvalues.size, self.latents)

    def _noise(self, point: LatentGaussian) -> Isotropic:
        if not isinstance(point.noise, Isotropic):
            raise ValueError(
                f"the noise is {type(point.noise).__name__}: probabilistic PCA is "
                "about Isotropic noise"
            )
        return point.noise
