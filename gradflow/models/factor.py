r"""Gaussian latent variables: factor analysis, probabilistic PCA and CCA, and
inter-battery factor analysis, as one family with one likelihood.

$x = Wz + \varepsilon$ with $z \sim N(0, I)$ and $\varepsilon \sim N(0, \Psi)$, so that
$x \sim N(0, WW^\top + \Psi)$.

| on paper | in code |
|---|---|
| $S = XX^\top / n$, centred data | `NegativeLogLikelihood.covariance` |
| $W$, $P$ by $K$; IBFA: $[W \mid B_1 \oplus B_2]$ | `LatentGaussian.loadings` |
| $\Psi$ | `LatentGaussian.noise`, a structure of `noise.py` |
| $M = (I + W^\top\Psi^{-1}W)^{-1}$, $H = MW^\top\Psi^{-1}$ | `posterior_map()` |
| $S_{xz} = SH^\top$, $S_{zz} = M + HSH^\top$ | `Statistics.cross`, `second` |

| model | noise | pattern of loadings |
|---|---|---|
| factor analysis (FA) | `Diagonal` | all free |
| probabilistic PCA (PPCA) | `Isotropic` | all free |
| probabilistic CCA (PCCA) | `Block` of `Full`, one per view | all free |
| inter-battery (IBFA) | `Block` of `Isotropic`, one per view | `battery_pattern` |

*Reference:* Tipping, Bishop (1999); Bach, Jordan (2005); Klami, Kaski (2006); all four
in the blog posts of G. Gundersen. *Erratum:* his printed updates for PPCA's noise,
PCCA's noise and all of IBFA's are not those that maximize; ours are.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float

from ..arguments import checked_arguments, checked_fields
from ..moments import Moments
from ..noise import AbstractNoise, Block, Full, Residual
from ..triangles import cholesky, triangular_inverse
from ..types import Key, Scalar
from .base import AbstractLatentEnergy


@checked_fields
class LatentGaussian(eqx.Module):
    r"""$N(0, WW^\top + \Psi)$: `loadings` $W$ and `noise` $\Psi$.

    **Raises:** `ValueError` when the shapes do not fit.
    """

    loadings: Float[Array, "x latents"]
    noise: AbstractNoise

    def __check_init__(self):
        shape = jnp.shape(self.loadings)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"loadings has shape {shape}: it must be a matrix (x, latents) without "
                "zero sides"
            )
        if shape[0] != self.noise.size:
            raise ValueError(
                f"loadings has {shape[0]} rows and noise has size {self.noise.size}: "
                "both need one per variable"
            )

    def covariance(self) -> Float[Array, "x x"]:
        r"""$WW^\top + \Psi$."""
        return self.loadings @ self.loadings.T + self.noise.matrix()

    def posterior_map(
        self,
    ) -> tuple[Float[Array, "latents x"], Float[Array, "latents latents"]]:
        """$H$ and $M$: $z$ given $x$ is $N(Hx, M)$."""
        white = self.noise.whiten(self.loadings)
        eye = jnp.eye(white.shape[1], dtype=white.dtype)
        inverse = triangular_inverse(cholesky(eye + white.T @ white))
        covariance = inverse.T @ inverse
        return covariance @ self.noise.solve(self.loadings).T, covariance

    def posterior(
        self, x: Float[Array, "samples x"]
    ) -> tuple[Float[Array, "samples latents"], Float[Array, "latents latents"]]:
        """The means of $z$ given each row, and the covariance, the same for all."""
        mean_map, covariance = self.posterior_map()
        return x @ mean_map.T, covariance

    def sample(self, key: Key, count: int) -> Float[Array, "samples x"]:
        """Draws of $x$."""
        rows, latents = self.loadings.shape
        draws = jr.normal(key, (latents + rows, count), self.loadings.dtype)
        return (self.loadings @ draws[:latents] + self.noise.color(draws[latents:])).T

    def log_density(self, x: Float[Array, "samples x"]) -> Float[Array, " samples"]:
        """$\\log p(x)$ of each row."""
        mean_map, _ = self.posterior_map()
        latent = mean_map @ x.T
        rest = self.noise.whiten(x.T - self.loadings @ latent)
        square = jnp.sum(rest**2, axis=0) + jnp.sum(latent**2, axis=0)
        return -0.5 * (self.log_normalizer() + square)

    def log_normalizer(self) -> Scalar:
        r"""$P \log 2\pi + \log|WW^\top + \Psi|$."""
        white = self.noise.whiten(self.loadings)
        eye = jnp.eye(white.shape[1], dtype=white.dtype)
        root = cholesky(eye + white.T @ white)
        return (
            self.noise.size * jnp.log(jnp.asarray(2 * jnp.pi, white.dtype))
            + self.noise.log_determinant()
            + 2 * jnp.sum(jnp.log(jnp.diagonal(root)))
        )


class Statistics(eqx.Module):
    """Expected sufficient statistics: what an E-step finds."""

    cross: Float[Array, "x latents"]
    second: Float[Array, "latents latents"]


def _as_pattern(pattern: Any) -> tuple[tuple[bool, ...], ...] | None:
    if pattern is None:
        return None
    array = np.asarray(pattern)
    if array.ndim != 2 or array.dtype != bool:
        raise ValueError(
            f"pattern has shape {array.shape} and dtype {array.dtype}: it must be a "
            "matrix (x, latents) of truth values, True where a loading is free"
        )
    return tuple(tuple(row) for row in array.tolist())


def _regressed(cross, second):
    inverse = triangular_inverse(cholesky(second))
    return cross @ inverse.T @ inverse


def _joint(moments: Moments) -> Float[Array, "x x"]:
    xx, xy, yy = moments.xx, moments.xy, moments.yy
    return xx if moments.autoencoding else jnp.block([[xx, xy], [xy.T, yy]])


class NegativeLogLikelihood(AbstractLatentEnergy[LatentGaussian, Statistics]):
    r"""$\frac12 (P \log 2\pi + \log|C| + \mathrm{tr}(C^{-1} S))$ with $C = WW^\top +
    \Psi$: minus the log-likelihood per sample of centred data.

    **Arguments:**

    - `moments`: of centred data (`Moments.from_data(..., center=True)`, which is not
      checked). If they have targets, x and y are two views of one sample. More
      variables than samples are welcome.
    - `pattern`: True where a loading is free; the others are 0. `None`: all are free.
    - `floor`: what EM lets no noise variance fall below, relative to the variance of
      the variable. Without one the likelihood may be unbounded (a Heywood case).

    **Raises:** `ValueError` for a floor outside of (0, 1), a pattern of other shape, or
    a constant variable, whose likelihood is unbounded.
    """

    moments: Moments
    root: Float[Array, "x x"]  # of the covariance
    pattern: tuple[tuple[bool, ...], ...] | None = eqx.field(static=True)
    floor: float = eqx.field(static=True)

    @checked_arguments
    def __init__(self, moments: Moments, pattern: Any = None, floor: float = 1e-6):
        self.moments, self.floor = moments, floor
        self.pattern = _as_pattern(pattern)
        values, vectors = jnp.linalg.eigh(_joint(moments))
        self.root = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]

    def __check_init__(self):
        number = isinstance(self.floor, (int, float, np.number))
        if isinstance(self.floor, bool) or not number or not 0 < self.floor < 1:
            raise ValueError(f"floor must be a number in (0, 1), got {self.floor!r}")
        if not isinstance(self.moments.xx, jax.Array):
            return  # A structure in the shape of an energy.
        size = self.size
        if self.pattern is not None and len(self.pattern) != size:
            raise ValueError(
                f"pattern has {len(self.pattern)} rows but the data have {size} "
                "variables: give one row for each"
            )
        if isinstance(self.moments.xx, jax.core.Tracer):
            return
        constant = np.flatnonzero(~(np.diagonal(np.asarray(self.covariance)) > 0))
        if constant.size:
            listed = ", ".join(f"x[{j}]" for j in constant[:10])
            raise ValueError(
                f"{listed}{', ...' * (constant.size > 10)} never moves: its likelihood "
                "is unbounded, so drop it from the data"
            )

    @property
    def size(self) -> int:
        """$P$, the number of variables of all views."""
        auto = self.moments.autoencoding
        return len(self.moments.xx) + (0 if auto else len(self.moments.yy))

    @property
    def covariance(self) -> Float[Array, "x x"]:
        """$S$, of all views together."""
        return _joint(self.moments)

    def __call__(self, point: LatentGaussian) -> Scalar:
        point = self.held(point)
        # C^-1 = T' Psi^-1 T + H' H with T = I - W H: a sum of squares, where the usual
        # difference of two traces would cancel if noise is small.
        seen = point.posterior_map()[0] @ self.root
        rest = point.noise.whiten(self.root - point.loadings @ seen)
        trace = jnp.sum(rest**2) + jnp.sum(seen**2)
        return 0.5 * (point.log_normalizer() + trace)

    def held(self, point: LatentGaussian) -> LatentGaussian:
        """The point with 0 for the loadings that the pattern does not leave free.

        **Raises:** `ValueError` for a point of other shape."""
        shape = point.loadings.shape
        if shape[0] != self.size:
            raise ValueError(
                f"the point has {shape[0]} variables but the data have {self.size}"
            )
        if self.pattern is None:
            return point
        if shape[1] != len(self.pattern[0]):
            raise ValueError(
                f"the point has {shape[1]} latent variables but pattern has "
                f"{len(self.pattern[0])} columns"
            )
        kept = jnp.where(jnp.asarray(self.pattern), point.loadings, 0)
        return LatentGaussian(kept, point.noise)

    def e_step(self, point: LatentGaussian) -> Statistics:
        mean_map, covariance = self.held(point).posterior_map()
        seen = mean_map @ self.root
        return Statistics(self.root @ seen.T, covariance + seen @ seen.T)

    def m_step(self, point: LatentGaussian, statistics: Statistics) -> LatentGaussian:
        r"""$W = S_{xz} S_{zz}^{-1}$ on the free loadings, and $\Psi$ fitted to what it
        leaves.

        Exact where the rows of each `Full` block have one pattern."""
        self._check_separable(point.noise)
        loadings = self.regress(statistics)
        return LatentGaussian(loadings, self.fit_noise(point, statistics, loadings))

    def regress(self, statistics: Statistics) -> Float[Array, "x latents"]:
        """The regression of each variable on the latent variables that it may load."""
        cross, second = statistics.cross, statistics.second
        if self.pattern is None:
            return _regressed(cross, second)
        loadings = jnp.zeros_like(cross)
        kinds, kind_of = np.unique(
            np.asarray(self.pattern), axis=0, return_inverse=True
        )
        for i, kind in enumerate(kinds):
            rows, columns = np.flatnonzero(kind_of.ravel() == i), np.flatnonzero(kind)
            if columns.size:
                block = _regressed(
                    cross[np.ix_(rows, columns)], second[np.ix_(columns, columns)]
                )
                loadings = loadings.at[np.ix_(rows, columns)].set(block)
        return loadings

    def fit_noise(
        self,
        point: LatentGaussian,
        statistics: Statistics,
        loadings: Float[Array, "x latents"],
    ) -> AbstractNoise:
        """The noise of the point's structure that is best beside these loadings."""
        residual = Residual(
            self.covariance, statistics.cross, statistics.second, loadings
        )
        return point.noise.fit(residual, self.floor)

    def groups(self, latents: int) -> list[np.ndarray]:
        """The latent variables that are free in the same rows: those that a rotation
        may mix."""
        if self.pattern is None:
            return [np.arange(latents)]
        _, kind_of = np.unique(np.asarray(self.pattern), axis=1, return_inverse=True)
        kind_of = kind_of.ravel()
        return [np.flatnonzero(kind_of == i) for i in range(kind_of.max() + 1)]

    def at_bounds(self, point: LatentGaussian) -> dict[str, Bool[Array, "..."]]:
        """ "heywood": which variables' noise is at its floor."""
        scales = jnp.diagonal(self.covariance)
        return {"heywood": point.noise.floored(scales, self.floor)}

    def parameters(self, point: LatentGaussian) -> int:
        """The number of free numbers of the covariance: loadings up to what leaves
        it as it is, and noise."""
        rows, latents = point.loadings.shape
        free = rows * latents if self.pattern is None else int(np.sum(self.pattern))
        for group in self.groups(latents):
            free -= len(group) * (len(group) - 1) // 2
        noise = point.noise
        full = lambda blocks: all(isinstance(block, Full) for block in blocks)
        if self.pattern is None and isinstance(noise, Block) and full(noise.blocks):
            # Only the products of two views' loadings matter: any change of basis of
            # one is undone by that of the other, if there are but two.
            if len(noise.blocks) == 2:
                latents = min(latents, *noise.sizes)
                free = rows * latents - latents**2
        return min(free + noise.parameters, rows * (rows + 1) // 2)

    def bic(self, point: LatentGaussian) -> Scalar:
        r"""$-2 \log L + k \log n$, less is better; $k$ counts the `parameters` and the
        means."""
        count = self.moments.count
        free = self.parameters(point) + self.size
        return 2 * count * self(point) + free * np.log(count)

    def _check_separable(self, noise: AbstractNoise):
        views = noise.views() if isinstance(noise, Block) else [(noise, 0, noise.size)]
        if self.pattern is None:
            return
        for block, start, stop in views:
            if isinstance(block, Full) and len(set(self.pattern[start:stop])) > 1:
                raise ValueError(
                    f"the loadings of variables {start} to {stop - 1} have different "
                    "patterns and noise in common: EM has no closed step for that, so "
                    "make the noise diagonal or the pattern the same"
                )


@checked_arguments
def battery_pattern(
    sizes: Sequence[int], shared: int, private: Sequence[int]
) -> Bool[np.ndarray, "x latents"]:
    """Which loadings of inter-battery factor analysis are free: `shared` latent
    variables load on all views, `private[i]` on view i, of `sizes[i]` variables.

    **Raises:** `ValueError` for lists of different lengths or numbers out of range.
    """
    if len(sizes) != len(private) or len(sizes) == 0:
        raise ValueError(
            f"sizes={tuple(sizes)} and private={tuple(private)} must have one number "
            "for each view"
        )
    for name, values, least in (
        ("sizes", sizes, 1),
        ("shared", (shared,), 0),
        ("private", private, 0),
    ):
        for value in values:
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if not whole or value < least:
                raise ValueError(
                    f"{name} must be whole numbers >= {least}, got {value!r}"
                )
    latents = shared + sum(private)
    if latents == 0:
        raise ValueError("shared=0 and private all 0: give a latent variable")
    pattern = np.zeros((sum(sizes), latents), bool)
    pattern[:, :shared] = True
    row, column = 0, shared
    for size, own in zip(sizes, private, strict=True):
        pattern[row : row + size, column : column + own] = True
        row, column = row + size, column + own
    return pattern
