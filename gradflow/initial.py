r"""Where runs start: callables from a key to a point.

Each is a callable of one key, to be given to a `Study` as `initialize`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

from .arguments import checked_fields
from .models.linear import AbstractLinearNetwork, DeepLinear
from .models.low_rank import LowRank
from .types import Key


def _as_widths(widths) -> Any:
    try:
        return tuple(widths)
    except TypeError:
        return widths, None  # refused by name


@checked_fields
class GaussianInit(eqx.Module):
    """Independent entries $N(0, \\text{scale}^2)$.

    **Raises:** `ValueError` for an empty list of widths, a width below 1, or a scale
    that is not a finite number > 0.
    """

    widths: tuple[int, ...] = eqx.field(static=True, converter=_as_widths)
    scale: float | Float[Array, ""]

    def __check_init__(self):
        _check_widths(self.widths)
        _check_scale(self.scale)

    def __call__(self, key: Key) -> DeepLinear:
        sizes = [into * out for into, out in itertools.pairwise(self.widths)]
        # All entries at once: each call of `normal` costs 0.5 s of compilation.
        entries = self.scale * jr.normal(key, (sum(sizes),))
        ends = list(itertools.accumulate(sizes, initial=0))
        return DeepLinear(
            tuple(
                entries[begin:end].reshape(out, into)
                for (begin, end), (into, out) in zip(
                    itertools.pairwise(ends),
                    itertools.pairwise(self.widths),
                    strict=True,
                )
            )
        )


@checked_fields
class GaussianLike(eqx.Module):
    """A given point, with independent entries $N(0, \\text{scale}^2)$ in its linear
    maps. What is no linear map, such as variances, stays, or is moved by
    $N(0, \\text{spread}^2)$ in its own coordinates.

    **Raises:** `ValueError` for a scale that is not a finite number > 0, or a spread
    that is not one >= 0.
    """

    point: PyTree[Float[Array, "..."]]
    scale: float | Float[Array, ""]
    spread: float | Float[Array, ""] = 0.0

    def __check_init__(self):
        _check_scale(self.scale)
        if not isinstance(self.spread, jax.Array) and self.spread != 0:
            _check_scale(self.spread, "spread")

    def __call__(self, key: Key):
        leaves, structure = jax.tree.flatten(self.point)
        sizes = [leaf.size for leaf in leaves]
        noise = jr.normal(key, (sum(sizes),), leaves[0].dtype)
        ends = list(itertools.accumulate(sizes, initial=0))
        moves = [
            noise[begin:end].reshape(leaf.shape)
            for leaf, (begin, end) in zip(leaves, itertools.pairwise(ends), strict=True)
        ]
        is_map = lambda node: isinstance(node, AbstractLinearNetwork)

        def moved(old, move):
            if is_map(old):
                return jax.tree.map(lambda leaf: self.scale * leaf, move)
            return old + self.spread * move

        moves = jax.tree.unflatten(structure, moves)
        return jax.tree.map(moved, self.point, moves, is_leaf=is_map)


@checked_fields
class OrthogonalInit(eqx.Module):
    """Each factor `scale` times a uniformly random matrix with orthonormal rows or
    columns.

    **Raises:** as `GaussianInit`.
    """

    widths: tuple[int, ...] = eqx.field(static=True, converter=_as_widths)
    scale: float | Float[Array, ""]

    def __check_init__(self):
        _check_widths(self.widths)
        _check_scale(self.scale)

    def __call__(self, key: Key) -> DeepLinear:
        weights = []
        for k, into, out in _layers(key, self.widths):
            frame = _frame(k, max(into, out), min(into, out))
            weights.append(self.scale * (frame if out >= into else frame.T))
        return DeepLinear(tuple(weights))


@checked_fields
class BalancedInit(eqx.Module):
    r"""Balanced factors of a given matrix: $W_j = T_j\,\mathrm{diag}(s^{1/N})\,
    T_{j-1}^\top$ with $W = U\,\mathrm{diag}(s)\,V^\top$, $T_0 = V$, $T_N = U$ and
    random orthonormal frames $T_j$ between.

    **Raises:** `ValueError` if the product's shape is not that of the widths, or if
    its rank exceeds the narrowest width.

    *Reference:* Bah et al. 2020, section 2 (balanced starts).
    """

    widths: tuple[int, ...] = eqx.field(static=True, converter=_as_widths)
    product: Float[Array, "y x"]

    def __check_init__(self):
        _check_widths(self.widths)
        shape = (self.widths[-1], self.widths[0])
        if jnp.shape(self.product) != shape:
            raise ValueError(
                f"product has shape {jnp.shape(self.product)} but widths="
                f"{self.widths} need {shape}"
            )
        if not isinstance(self.product, jax.core.Tracer):
            if not np.all(np.isfinite(self.product)):
                raise ValueError("product has non-finite values: give finite ones")
            rank = int(np.linalg.matrix_rank(np.asarray(self.product)))
            if rank > min(self.widths):
                raise ValueError(
                    f"product has rank={rank}, which is larger than min(widths)="
                    f"{min(self.widths)}: widen the narrowest layer"
                )

    def __call__(self, key: Key) -> DeepLinear:
        rank, depth = min(self.widths), len(self.widths) - 1
        left, values, right = jnp.linalg.svd(self.product, full_matrices=False)
        # The N-th root of rounding is no rounding: at depth 5, 1e-16 becomes 6e-4.
        noise = max(self.product.shape) * jnp.finfo(values.dtype).eps * values[0]
        root = jnp.where(values > noise, values, 0.0)[:rank] ** (1 / depth)
        frames = [right[:rank].T]
        for k, _, out in _layers(key, self.widths[:-1]):
            frames.append(_frame(k, out, rank))
        frames.append(left[:, :rank])
        return DeepLinear(
            tuple(
                (upper * root[None, :]) @ lower.T
                for lower, upper in zip(frames[:-1], frames[1:], strict=True)
            )
        )


@checked_fields
class LowRankInit(eqx.Module):
    """The best approximation of rank `rank` to a matrix of independent entries
    $N(0, \\text{scale}^2)$, as a `LowRank` point. Its factors,
    `point.balanced(depth)`, are a balanced start of a network.

    **Raises:** `ValueError` unless `shape` is (y, x) of whole numbers >= 1, the rank
    is from 1 to the smaller one, and the scale is a finite number > 0.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=_as_widths)
    rank: int = eqx.field(static=True)
    scale: float | Float[Array, ""]

    def __check_init__(self):
        if len(self.shape) != 2:
            raise ValueError(f"shape={self.shape} must be two numbers: (y, x)")
        _check_widths(self.shape, "shape")
        _check_scale(self.scale)
        if isinstance(self.rank, bool) or not isinstance(self.rank, (int, np.integer)):
            raise ValueError(f"rank must be a whole number, got {self.rank!r}")
        if not 1 <= self.rank <= min(self.shape):
            raise ValueError(
                f"rank={self.rank} must be from 1 to {min(self.shape)}, the smaller "
                "side"
            )

    def __call__(self, key: Key) -> LowRank:
        weight = self.scale * jr.normal(key, self.shape)
        left, values, right = jnp.linalg.svd(weight, full_matrices=False)
        k = self.rank
        return LowRank(left[:, :k], jnp.log(values[:k]), right[:k].T)


class OrthonormalBalancedInit(eqx.Module):
    r"""The start of section 7 of the source: $W_j = U_j U_{j-1}^\top$ with $U_j$ the
    first $d_1$ columns of a random orthogonal $V_j$; balanced, with all $d_1$ singular
    values of the product equal to 1.

    For equal first and last widths $V_0 = V_N$, so that $W(0) = U_N U_N^\top$ is a
    projection and $u^\top W(0) u > 0$ for almost every $u$.

    **Raises:** `ValueError` as `GaussianInit`, or if $d_1$ is not the narrowest width.

    *Reference:* Bah et al. 2020, section 7.1.1. *Erratum:* $V_0$ is needed as well,
    and the condition claimed there holds only if $V_0 = V_N$.
    """

    widths: tuple[int, ...] = eqx.field(static=True, converter=_as_widths)

    def __check_init__(self):
        _check_widths(self.widths)
        if self.widths[1] != min(self.widths):
            raise ValueError(
                f"widths={self.widths}: this start needs widths[1] to be the smallest; "
                "section7_widths gives such widths"
            )

    def __call__(self, key: Key) -> DeepLinear:
        rank = self.widths[1]
        keys = jr.split(key, len(self.widths))
        frames = [
            _frame(k, width, rank) for k, width in zip(keys, self.widths, strict=True)
        ]
        if self.widths[0] == self.widths[-1]:
            frames[0] = frames[-1]
        return DeepLinear(
            tuple(
                upper @ lower.T
                for lower, upper in zip(frames[:-1], frames[1:], strict=True)
            )
        )


@checked_fields
class NearPoint(eqx.Module):
    """A given point moved by exactly `distance` (Euclidean, over all entries): in a
    random direction, or along `direction` if there is one.

    **Raises:** `ValueError` if `distance` is not a finite number >= 0, or if
    `direction` is 0.
    """

    point: PyTree[Float[Array, "..."]]
    distance: float | Float[Array, ""]
    direction: PyTree[Float[Array, "..."]] | None = None

    def __check_init__(self):
        if not isinstance(self.distance, jax.Array):
            number = isinstance(self.distance, (int, float, np.number))
            if not (number and 0 <= self.distance < math.inf):
                raise ValueError(
                    f"distance must be a finite number >= 0, got {self.distance!r}"
                )
        of = jax.tree.structure(self.point)
        if self.direction is not None and jax.tree.structure(self.direction) != of:
            raise ValueError(
                f"direction is a {type(self.direction).__name__} and point a "
                f"{type(self.point).__name__}: both need the same arrays"
            )
        moves = jax.tree.leaves(self.direction)
        known = not any(isinstance(move, jax.core.Tracer) for move in moves)
        if moves and known and not any(np.any(move) for move in moves):
            raise ValueError("direction is 0: leave it out for a random one")

    def __call__(self, key: Key):
        leaves, structure = jax.tree.flatten(self.point)
        if self.direction is None:
            keys = jr.split(key, len(leaves))
            moves = [
                jr.normal(k, leaf.shape, leaf.dtype)
                for k, leaf in zip(keys, leaves, strict=True)
            ]
        else:
            moves = jax.tree.leaves(self.direction)
        length = jnp.sqrt(sum(jnp.sum(move**2) for move in moves))
        moved = [
            leaf + (self.distance / length) * move
            for leaf, move in zip(leaves, moves, strict=True)
        ]
        return jax.tree.unflatten(structure, moved)


def section7_widths(dimension: int, depth: int, rank: int | None = None):
    r"""$d_0 = d_N = d$, $d_j = \lfloor r + (d - r)(j - 1)/(N - 1) + \frac12 \rfloor$:
    the widths of section 7 of the source, narrowest first.

    `rank` defaults to $\lfloor d/2 + \frac12 \rfloor$. **Raises:** `ValueError` for
    depth < 1, dimension < 1 or a rank outside 1..dimension.

    *Reference:* Bah et al. 2020, section 7.1.1. *Erratum:* $d_0$ is not on the grid,
    and the rounding is half up.
    """
    for name, value in (("depth", depth), ("dimension", dimension), ("rank", rank)):
        if name == "rank" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if name != "rank" and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    rank = math.floor(dimension / 2 + 0.5) if rank is None else rank
    if not 1 <= rank <= dimension:
        raise ValueError(
            f"rank={rank} must be from 1 to dimension={dimension}: no layer can be "
            "narrower than 1 or pass more than the data have"
        )
    if depth == 1:
        return (dimension, dimension)
    grid = [
        math.floor(rank + (dimension - rank) * j / (depth - 1) + 0.5)
        for j in range(depth)
    ]
    return (dimension, *grid)


def _layers(key, widths: Sequence[int]):
    keys = jr.split(key, max(len(widths) - 1, 1))
    return list(zip(keys, widths[:-1], widths[1:], strict=False))


def _frame(key, rows, columns):
    """A uniformly random matrix with orthonormal columns."""
    q, r = jnp.linalg.qr(jr.normal(key, (rows, columns)))
    # Without these signs the distribution is not uniform.
    return q * jnp.sign(jnp.diagonal(r))[None, :]


def _check_widths(widths, name="widths"):
    if widths[1:] == (None,):
        raise ValueError(f"{name} must be a list of whole numbers, got {widths[0]!r}")
    if len(widths) < 2:
        raise ValueError(
            f"{name}={widths} needs at least two numbers: inputs and outputs"
        )
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, (int, np.integer)):
            raise ValueError(f"{name}={widths} must be whole numbers, got {width!r}")
        if width < 1:
            raise ValueError(f"{name}={widths} must all be >= 1, got {width}")


def _check_scale(scale, name="scale"):
    if isinstance(scale, (bool, str)) or not isinstance(
        scale, (int, float, np.number, jax.Array)
    ):
        raise ValueError(f"{name} must be a number > 0, got {scale!r}")
    if isinstance(scale, jax.core.Tracer):
        return
    if not np.all((np.asarray(scale) > 0) & np.isfinite(np.asarray(scale))):
        raise ValueError(f"{name} must be a finite number > 0, got {scale}")
