r"""Structures of a noise covariance: what may vary, in coordinates without bounds.

| on paper | in code |
|---|---|
| $\Psi = \sigma^2 I$ | `Isotropic` |
| $\Psi = \mathrm{diag}(\psi)$ | `Diagonal` |
| $\Psi$ positive definite | `Full` |
| $\Psi = \mathrm{blkdiag}(\Psi_1, \Psi_2, \dots)$ | `Block`, one structure per view |

Variances are kept as logarithms and a full matrix as the logarithm of the diagonal of
its Cholesky factor and what is below it, so that every real vector is a positive
definite $\Psi$: gradient flow and extrapolation need no constraint.
"""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .arguments import check_sides, checked_fields
from .triangles import anywhere, cholesky, triangular_inverse
from .types import Scalar


# Within this of its floor, relatively, a variance is at it.
TOUCHING = 1e-6


class Residual(eqx.Module):
    r"""$S - XW^\top - WX^\top + WZW^\top$: the second moment of $x - Wz$, where
    $X$ and $Z$ are those of $x, z$ and of $z$. Not formed where its diagonal will do.
    """

    covariance: Float[Array, "x x"]
    cross: Float[Array, "x latents"]
    second: Float[Array, "latents latents"]
    loadings: Float[Array, "x latents"]

    def rows(self, start: int, stop: int) -> "Residual":
        """That of some of the variables."""
        cut = slice(start, stop)
        return Residual(
            self.covariance[cut, cut], self.cross[cut], self.second, self.loadings[cut]
        )

    def scales(self) -> Float[Array, " x"]:
        """The variances of the variables themselves."""
        return jnp.diagonal(self.covariance)

    def diagonal(self) -> Float[Array, " x"]:
        rest = self.loadings @ self.second - 2 * self.cross
        return self.scales() + jnp.sum(rest * self.loadings, axis=1)

    def matrix(self) -> Float[Array, "x x"]:
        half = (0.5 * self.loadings @ self.second - self.cross) @ self.loadings.T
        return self.covariance + half + half.T


class AbstractNoise(eqx.Module):
    r"""A positive definite matrix $\Psi$ of some structure.

    To implement your own: these methods; $L$ is any square root, $\Psi = LL^\top$.
    """

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of variables."""

    @property
    @abc.abstractmethod
    def parameters(self) -> int:
        """The number of free numbers."""

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "x x"]:
        r"""$\Psi$."""

    @abc.abstractmethod
    def log_determinant(self) -> Scalar:
        r"""$\log|\Psi|$."""

    @abc.abstractmethod
    def whiten(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        r"""$L^{-1} A$."""

    @abc.abstractmethod
    def solve(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        r"""$\Psi^{-1} A$."""

    @abc.abstractmethod
    def color(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        r"""$L A$."""

    @abc.abstractmethod
    def fit(self, residual: Residual, floor: float) -> "AbstractNoise":
        r"""The $\Psi$ of this structure that minimizes $\log|\Psi| +
        \mathrm{tr}(\Psi^{-1} R)$ among those not below `floor` times the variances of
        the variables."""

    @abc.abstractmethod
    def floored(self, scales: Float[Array, " x"], floor: float) -> Bool[Array, " x"]:
        """Which variables' noise is at (or below) `floor` times `scales`."""


@checked_fields
class Isotropic(AbstractNoise):
    r"""$\sigma^2 I$ for so many variables."""

    log_variance: Scalar
    variables: int = eqx.field(static=True)

    def __check_init__(self):
        count = self.variables
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise ValueError(f"variables must be a whole number, got {count!r}")
        if count < 1:
            raise ValueError(f"variables must be >= 1, got {count}")

    @classmethod
    def of(cls, variance: Any, variables: int) -> "Isotropic":
        """From the variance. **Raises:** `ValueError` unless it is finite and > 0."""
        return cls(jnp.log(_positive("variance", variance, 0)), variables)

    @property
    def size(self) -> int:
        return self.variables

    @property
    def parameters(self) -> int:
        return 1

    def matrix(self) -> Float[Array, "x x"]:
        variance = jnp.exp(self.log_variance)
        return variance * jnp.eye(self.size, dtype=variance.dtype)

    def log_determinant(self) -> Scalar:
        return self.size * self.log_variance

    def whiten(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return matrix * jnp.exp(-0.5 * self.log_variance)

    def solve(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return matrix * jnp.exp(-self.log_variance)

    def color(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return matrix * jnp.exp(0.5 * self.log_variance)

    def fit(self, residual: Residual, floor: float) -> "Isotropic":
        lowest = floor * jnp.mean(residual.scales())
        return Isotropic(
            jnp.log(jnp.maximum(jnp.mean(residual.diagonal()), lowest)), self.size
        )

    def floored(self, scales: Float[Array, " x"], floor: float) -> Bool[Array, " x"]:
        at = _touches(jnp.exp(self.log_variance), jnp.mean(scales), floor)
        return jnp.full(scales.shape, at)


@checked_fields
class Diagonal(AbstractNoise):
    r"""$\mathrm{diag}(\psi_1, \psi_2, \dots)$."""

    log_variances: Float[Array, " x"]

    def __check_init__(self):
        check_sides("log_variances", self.log_variances)

    @classmethod
    def of(cls, variances: Any) -> "Diagonal":
        """From the variances. **Raises:** `ValueError` unless finite and > 0."""
        return cls(jnp.log(_positive("variances", variances, 1)))

    @property
    def size(self) -> int:
        return self.log_variances.shape[0]

    @property
    def parameters(self) -> int:
        return self.size

    def matrix(self) -> Float[Array, "x x"]:
        return jnp.diag(jnp.exp(self.log_variances))

    def log_determinant(self) -> Scalar:
        return jnp.sum(self.log_variances)

    def whiten(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return matrix * jnp.exp(-0.5 * self.log_variances)[:, None]

    def solve(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return matrix * jnp.exp(-self.log_variances)[:, None]

    def color(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return matrix * jnp.exp(0.5 * self.log_variances)[:, None]

    def fit(self, residual: Residual, floor: float) -> "Diagonal":
        lowest = floor * residual.scales()
        return Diagonal(jnp.log(jnp.maximum(residual.diagonal(), lowest)))

    def floored(self, scales: Float[Array, " x"], floor: float) -> Bool[Array, " x"]:
        return _touches(jnp.exp(self.log_variances), scales, floor)


@checked_fields
class Full(AbstractNoise):
    r"""Any positive definite matrix $LL^\top$: `entries` are those of the lower
    triangle of $L$, row by row, with logarithms of the diagonal.
    """

    entries: Float[Array, " entries"]

    def __check_init__(self):
        check_sides("entries", self.entries)
        shape = jnp.shape(self.entries)
        if len(shape) != 1 or self.size * (self.size + 1) // 2 != shape[0]:
            raise ValueError(
                f"entries has shape {shape}: a triangle of n rows has n (n + 1) / 2 "
                "entries; Full.of makes it from a matrix"
            )

    @classmethod
    def of(cls, matrix: Any) -> "Full":
        """From the matrix. **Raises:** `ValueError` unless it is square, symmetric and
        positive definite."""
        matrix = jnp.asarray(matrix, dtype=float)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"matrix has shape {matrix.shape}: a covariance must be square"
            )
        lower = cholesky(matrix)
        if not isinstance(matrix, jax.core.Tracer):
            if not np.allclose(matrix, matrix.T, rtol=1e-6, atol=0):
                raise ValueError("matrix isn't symmetric: a covariance must be")
            if not np.all(np.isfinite(lower)):
                raise ValueError(
                    "matrix isn't positive definite: a noise covariance must be"
                )
        return cls._of_root(lower)

    @classmethod
    def _of_root(cls, lower: Float[Array, "x x"]) -> "Full":
        eye = jnp.eye(len(lower), dtype=bool)
        logs = jnp.log(jnp.where(eye, lower, 1))
        return cls(jnp.where(eye, logs, lower)[np.tril_indices(len(lower))])

    @property
    def size(self) -> int:
        return (math.isqrt(8 * self.entries.shape[0] + 1) - 1) // 2

    @property
    def parameters(self) -> int:
        return self.entries.shape[0]

    def root(self) -> Float[Array, "x x"]:
        """The lower triangular $L$."""
        shape, eye = (self.size, self.size), jnp.eye(self.size, dtype=bool)
        lower = jnp.zeros(shape, self.entries.dtype)
        lower = lower.at[np.tril_indices(self.size)].set(self.entries)
        return jnp.where(eye, jnp.exp(jnp.where(eye, lower, 0)), lower)

    def matrix(self) -> Float[Array, "x x"]:
        root = self.root()
        return root @ root.T

    def log_determinant(self) -> Scalar:
        places = np.cumsum(np.arange(1, self.size + 1)) - 1
        return 2 * jnp.sum(self.entries[places])

    def whiten(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return triangular_inverse(self.root()) @ matrix

    def solve(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        inverse = triangular_inverse(self.root())
        return inverse.T @ (inverse @ matrix)

    def color(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return self.root() @ matrix

    def fit(self, residual: Residual, floor: float) -> "Full":
        root = jnp.sqrt(residual.scales())
        scaled = residual.matrix() / root[:, None] / root[None, :]
        eye = jnp.eye(self.size, dtype=scaled.dtype)
        above = jnp.all(jnp.isfinite(cholesky(scaled - floor * eye)))

        def raised():
            # By QR: the product of the factors would round off the smallest.
            values, vectors = jnp.linalg.eigh(scaled)
            values = jnp.sqrt(jnp.maximum(values, floor))
            upper = jnp.linalg.qr(values[:, None] * vectors.T, mode="r")
            lower = upper.T * jnp.sign(jnp.diagonal(upper))[None, :]
            return jnp.where(above, cholesky(scaled), lower)

        lower = jax.lax.cond(anywhere(~above), raised, lambda: cholesky(scaled))
        return Full._of_root(lower * root[:, None])

    def floored(self, scales: Float[Array, " x"], floor: float) -> Bool[Array, " x"]:
        """At its floor is a combination of variables; named is the one with the
        largest share in it."""
        root = jnp.sqrt(scales)
        values, vectors = jnp.linalg.eigh(self.matrix() / root[:, None] / root[None, :])
        at = _touches(values, jnp.ones_like(values), floor)
        foremost = jnp.argmax(jnp.abs(vectors), axis=0)
        return jnp.zeros(scales.shape, bool).at[foremost].max(at)


@checked_fields
class Block(AbstractNoise):
    """One structure for each view, and no noise in common."""

    blocks: tuple[AbstractNoise, ...]

    def __check_init__(self):
        if len(self.blocks) == 0:
            raise ValueError("blocks is empty: give one noise structure per view")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of variables of each view."""
        return tuple(block.size for block in self.blocks)

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks)

    def matrix(self) -> Float[Array, "x x"]:
        return jax.scipy.linalg.block_diag(*(block.matrix() for block in self.blocks))

    def log_determinant(self) -> Scalar:
        return jnp.sum(jnp.stack([block.log_determinant() for block in self.blocks]))

    def whiten(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return self._each(lambda block, rows: block.whiten(rows), matrix)

    def solve(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return self._each(lambda block, rows: block.solve(rows), matrix)

    def color(self, matrix: Float[Array, "x k"]) -> Float[Array, "x k"]:
        return self._each(lambda block, rows: block.color(rows), matrix)

    def fit(self, residual: Residual, floor: float) -> "Block":
        return Block(
            tuple(
                block.fit(residual.rows(start, stop), floor)
                for block, start, stop in self.views()
            )
        )

    def floored(self, scales: Float[Array, " x"], floor: float) -> Bool[Array, " x"]:
        return jnp.concatenate(
            [
                block.floored(scales[start:stop], floor)
                for block, start, stop in self.views()
            ]
        )

    def views(self) -> list[tuple[AbstractNoise, int, int]]:
        """Each block with its first variable and the one after its last."""
        ends = np.cumsum((0, *self.sizes)).tolist()
        return list(zip(self.blocks, ends[:-1], ends[1:], strict=True))

    def _each(self, function, matrix):
        return jnp.concatenate(
            [function(block, matrix[start:stop]) for block, start, stop in self.views()]
        )


def _touches(variances, scales, floor):
    return variances <= (1 + TOUCHING) * floor * scales


def _positive(name: str, values: Any, dimensions: int) -> Array:
    if isinstance(values, jax.core.Tracer):
        return values
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers > 0, got {values!r}") from None
    if array.ndim != dimensions or array.size == 0:
        kind = "one number" if dimensions == 0 else "a list of numbers"
        raise ValueError(f"{name} must be {kind}, got shape {array.shape}")
    bad = ~(np.isfinite(array) & (array > 0))
    if bad.any():
        where = f" at [{np.argmax(bad)}]" if dimensions else ""
        raise ValueError(
            f"{name} must be finite and > 0, got {array.flat[np.argmax(bad)]}{where}"
        )
    return jnp.asarray(array)
