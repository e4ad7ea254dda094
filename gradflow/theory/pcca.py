r"""Probabilistic CCA: every critical point, and what kind it is.

| on paper | in code |
|---|---|
| $S_{11}^{-1/2} S_{12} S_{22}^{-1/2} = \sum_j \rho_j v_{1j} v_{2j}^\top$ | `left`, |
| | `correlations`, `right` |
| $J$, at most $K$ of these modes | `modes`, `latents` |

*Reference:* Bach, Jordan (2005).
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
from ..noise import Block, Full
from ..spectrum import cutoff, psd_power, svd_signed
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


class PCCATheory(AbstractTheory[LatentGaussian]):
    r"""The critical points of probabilistic CCA: any $J$ of at most $K$ pairs of
    canonical directions, with $C_{12} = S_{11}^{1/2} \sum_{j \in J} \rho_j v_{1j}
    v_{2j}^\top S_{22}^{1/2}$ and $C_{ii} = S_{ii}$; all but the first $K$ are strict
    saddles.

    Only $W_1 W_2^\top$ is determined. `certificate` is about runs that stay bounded:
    the minimizers reach to where a view's noise becomes singular.

    **Arguments:** `sizes`: of the two views, where the moments do not say so.

    **Raises:** `ValueError` for other than two views, a pattern, or a view that is
    singular or determines a direction of the other: the likelihood is then unbounded.

    *Reference:* Bach, Jordan 2005, section 2. *Erratum:* EM's noise update is,
    per view, the block of the residual of all views.
    """

    energy: NegativeLogLikelihood
    latents: int = eqx.field(static=True)
    sizes: tuple[int, int] = eqx.field(static=True)
    roots: tuple[Float[Array, "x1 x1"], Float[Array, "x2 x2"]]
    inverse_roots: tuple[Float[Array, "x1 x1"], Float[Array, "x2 x2"]]
    left: Float[Array, "x1 modes"]
    correlations: Float[Array, " modes"]
    right: Float[Array, "modes x2"]

    @checked_arguments
    def __init__(
        self,
        energy: NegativeLogLikelihood,
        latents: int,
        sizes: Sequence[int] | None = None,
    ):
        check_free(energy)
        check_latents(latents)
        self.sizes = _two_views(energy, sizes)
        first, joint = self.sizes[0], energy.covariance
        views = (joint[:first, :first], joint[first:, first:])
        for name, view in zip(("first", "second"), views, strict=True):
            values = jnp.linalg.eigvalsh(view)
            least = cutoff(len(view), view.dtype) * values[-1]
            if not isinstance(values, jax.core.Tracer) and values[0] <= least:
                raise ValueError(
                    f"the covariance of the {name} view is singular: the likelihood is "
                    "unbounded, so drop variables or restrict it to fewer directions"
                )
        self.energy = energy
        self.latents = int(latents)
        self.roots = (psd_power(views[0], 0.5), psd_power(views[1], 0.5))
        self.inverse_roots = (psd_power(views[0], -0.5), psd_power(views[1], -0.5))
        crossed = self.inverse_roots[0] @ joint[:first, first:] @ self.inverse_roots[1]
        self.left, self.correlations, self.right = svd_signed(crossed)
        largest = self.correlations[0]
        if not isinstance(largest, jax.core.Tracer) and largest > 1 - 1e-10:
            raise ValueError(
                "a direction of one view determines one of the other (canonical "
                "correlation 1): the likelihood is unbounded, so drop variables"
            )

    def spectrum(self) -> Float[Array, " modes"]:
        r"""$\rho_1 \ge \rho_2 \ge \dots$, the canonical correlations."""
        return self.correlations

    def critical_energy(self, modes: Sequence[int]) -> Scalar:
        r"""$\frac12 (P \log 2\pi + \log|S_{11}| + \log|S_{22}| + \sum_{j \in J} \log(1
        - \rho_j^2) + P)$."""
        mask = np.zeros(self.correlations.shape, dtype=bool)
        mask[self._checked(modes)] = True
        return self._value(jnp.asarray(mask))

    def optimal_energy(self) -> Scalar:
        """That of the first $K$ modes."""
        return self.critical_energy(range(self._most))

    def optimum(self) -> LatentGaussian:
        r"""A global minimizer: $W_i = S_{ii}^{1/2} V_i \rho^{1/2}$. The others have
        $W_1 A$ and $W_2 A^{-\top}$, as far as the noise stays positive."""
        return self.critical_point(range(self._most))

    def critical_point(self, modes: Sequence[int]) -> LatentGaussian:
        """The point of these modes, with columns of zeros for the rest."""
        kept = self._checked(modes)
        share = jnp.sqrt(self.correlations[kept])[None, :]
        loadings = [
            root @ directions * share
            for root, directions in zip(
                self.roots, (self.left[:, kept], self.right[kept].T), strict=True
            )
        ]
        noise = [
            Full.of(root @ root - own @ own.T)
            for root, own in zip(self.roots, loadings, strict=True)
        ]
        idle = ((0, 0), (0, self.latents - len(kept)))
        return LatentGaussian(
            jnp.pad(jnp.concatenate(loadings), idle), Block(tuple(noise))
        )

    def index_sets(self) -> list[tuple[int, ...]]:
        """Every $J$, smallest first. **Raises:** as that of `PPCATheory`."""
        return list(subsets(self))

    def index(self, modes: Sequence[int]) -> int:
        r"""The number of negative eigenvalues of the Hessian at `critical_point`: one
        for each pair $j \in J$, $i \notin J$ with $\rho_i > \rho_j$, and for each
        column of zeros and $i \notin J$ with $\rho_i > 0$."""
        kept = set(self._checked(modes).tolist())
        values = np.asarray(self.correlations)
        rest = [i for i in range(values.size) if i not in kept]
        swaps = sum(values[i] - values[j] > TIE for i in rest for j in kept)
        above = sum(values[i] > TIE for i in rest)
        return int(swaps + (self.latents - len(kept)) * above)

    @property
    def certificate(self) -> EnergyBelow[LatentGaussian]:
        """Whether the energy is below every critical value but the least."""
        strengths = -0.5 * jnp.log1p(-(self.correlations**2))
        inside = strengths[: self._most, None]
        outside = jnp.append(strengths[self._most :], 0.0)[None, :]
        gaps = inside - outside
        gap = jnp.min(jnp.where(gaps > TIE, gaps, jnp.inf))
        return below(self.energy, self.optimal_energy(), gap)

    def active(self, point: LatentGaussian) -> Bool[Array, " modes"]:
        r"""The modes of the nearest critical point, from $v_{1j}^\top S_{11}^{-1/2} W_1
        W_2^\top S_{22}^{-1/2} v_{2j} > \rho_j / 2$."""
        first, second = self._whitened(point)
        along = jnp.sum((self.left.T @ first) * (self.right @ second), axis=1)
        values = self.correlations
        share = jnp.where(values > TIE, along / jnp.where(values > TIE, values, 1), 0)
        return nearest(share, values)

    def match(self, point: LatentGaussian) -> Match:
        """How `point` compares with the critical points."""
        modes = self.active(point)
        first, second = self._whitened(point)
        product = first @ second.T
        missing = (self.left * self.correlations[None, :]) @ self.right - product
        offs = [jnp.linalg.norm(missing @ second), jnp.linalg.norm(missing.T @ first)]
        noise = self._noise(point)
        for block, own, root in zip(
            noise.blocks, (first, second), self.inverse_roots, strict=True
        ):
            seen = own @ own.T + root @ block.matrix() @ root
            offs.append(jnp.linalg.norm(seen - jnp.eye(len(root), dtype=seen.dtype)))
        values = jnp.linalg.svd(product, compute_uv=False)
        unit = jnp.ones_like(values[0])
        off = jnp.max(jnp.stack(offs))
        return matched(self, off, values, unit, modes, self._value(modes), point)

    def remaining(self, point: LatentGaussian) -> Scalar:
        r"""$\log(1/\text{distance})$ over the rate of the fastest exchange in whitened
        coordinates, where both views have unit covariance."""
        modes, values = self.active(point), self.correlations
        best = jnp.max(jnp.where(modes, 0, values))
        worst = jnp.min(jnp.where(modes, values, jnp.inf))
        rate = best - jnp.where(jnp.sum(modes) < self._most, 0, worst)
        first, second = self._whitened(point)
        along = (self.left.T @ first) @ (self.right @ second).T
        far = jnp.linalg.norm(jnp.where(modes[:, None] & modes[None, :], 0, along))
        return escape(rate, far)

    @property
    def _most(self) -> int:
        return min(self.latents, self.correlations.size)

    def _value(self, mask):
        logs = sum(jnp.linalg.slogdet(root)[1] for root in self.roots)
        kept = jnp.sum(jnp.where(mask, jnp.log1p(-(self.correlations**2)), 0))
        constant = self.energy.size * (math.log(2 * math.pi) + 1)
        return 0.5 * (constant + 2 * logs + kept)

    def _whitened(self, point: LatentGaussian):
        self._noise(point)
        first = self.sizes[0]
        return (
            self.inverse_roots[0] @ point.loadings[:first],
            self.inverse_roots[1] @ point.loadings[first:],
        )

    def _noise(self, point: LatentGaussian) -> Block:
        noise = point.noise
        blocks = noise.blocks if isinstance(noise, Block) else ()
        full = all(isinstance(block, Full) for block in blocks)
        if not isinstance(noise, Block) or not full or noise.sizes != self.sizes:
            raise ValueError(
                f"probabilistic CCA is about a Block of two Full noises of sizes "
                f"{self.sizes}, got {type(noise).__name__}"
            )
        return noise

    def _checked(self, modes):
        return checked(modes, self.correlations.size, self.latents)


def _two_views(energy, sizes) -> tuple[int, int]:
    moments = energy.moments
    if sizes is None:
        if moments.autoencoding:
            raise ValueError("the moments are of one view: give the sizes of the two")
        sizes = (len(moments.xx), len(moments.yy))
    sizes = tuple(int(size) for size in sizes)
    if len(sizes) != 2 or min(sizes) < 1 or sum(sizes) != energy.size:
        raise ValueError(
            f"sizes={sizes} must be two numbers >= 1 whose sum is the number of "
            f"variables, {energy.size}: PCCA of more views has no closed form"
        )
    return sizes
