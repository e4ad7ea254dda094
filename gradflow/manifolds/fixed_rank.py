r"""Matrices of rank $k$ with the metric of a deep linear network.

| on paper | in code |
|---|---|
| $\mathcal{A}_W(Z)$ | `balanced_operator` |
| $\mathcal{A}_W^{-1}(Z)$ on $T_W$ | `balanced_inverse` |
| $K_{ab}$ | `_weights` |
| $M_k$, $N$ | `FixedRank(rank, depth)` |

$\mathcal{A}_W(Z) = \sum_{j=1}^N (WW^\top)^{(N-j)/N} Z\, (W^\top W)^{(j-1)/N}$. With
$W = USV^\top$ it multiplies the entries of $U^\top Z V$ by
$K_{ab} = \sum_j s_a^{2(N-j)/N} s_b^{2(j-1)/N}$: a sum of positive terms, so nothing
cancels, whatever the singular values.

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, sections 3 and 4.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arguments import check_shape, check_whole, checked_arguments, checked_fields
from ..models.linear import AbstractLinearNetwork, LinearMap
from ..models.low_rank import LowRank
from ..types import Scalar
from .base import AbstractManifold


@checked_fields
class FixedRank(AbstractManifold[AbstractLinearNetwork]):
    r"""$M_k$ with $g_W(Z_1, Z_2) = \langle \mathcal{A}_W^{-1} Z_1, Z_2 \rangle$; for
    depth 1 the embedded metric.

    With it $\dot W = -\mathrm{grad}\,L^1(W)$ is the flow of the product of $N$
    balanced factors. Points are `LinearMap` (all entries of W) or `LowRank`, in
    $O((d_x + d_y) k^2)$ beside the differential. A tangent at a `LowRank` point
    $Y, l, X$ holds $\dot Y$ and $\dot X$ (with $\dot l = 0$) of one of the curves of
    representations; others represent the same tangent.

    **Raises:** `ValueError` unless rank and depth are whole numbers >= 1.

    *Reference:* Bah et al. 2020, Proposition 16 and Corollary 17.
    """

    rank: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)

    def __check_init__(self):
        check_whole("rank", self.rank)
        check_whole("depth", self.depth)

    def gradient(
        self, point: AbstractLinearNetwork, differential: AbstractLinearNetwork
    ) -> AbstractLinearNetwork:
        r"""$\mathcal{A}_W(\nabla E)$, for depth 1 the tangent part of $\nabla E$.

        For a `LowRank` point it comes as $BW + WA$ with $B, A$ bounded for depth >= 2,
        in the singular basis $B_{ab} = K_{ab} \tilde G_{ab} s_b / (s_a^2 + s_b^2)$ and
        $A_{ab} = K_{ab} \tilde G_{ab} s_a / (s_a^2 + s_b^2)$: both sides change by
        relative amounts, and so does every singular value.
        """
        self._check(point)
        if isinstance(point, LinearMap):
            assert isinstance(differential, LinearMap)
            weight, slope = point.weight, differential.weight
            if self.depth == 1:  # the identity, of what is tangent
                return LinearMap(tangent_projection(weight, slope, self.rank))
            return LinearMap(
                balanced_operator(weight, slope, self.depth, rank=self.rank)
            )
        assert isinstance(point, LowRank) and isinstance(differential, LowRank)
        svd = point.canonical()
        onto_left, onto_right = svd.left.T @ point.left, svd.right.T @ point.right
        # By Y and X the differential is G X D and G^T Y D; wanted are G V and G^T U.
        right = (differential.left / point.values[None, :]) @ jnp.linalg.inv(onto_right)
        left = (differential.right / point.values[None, :]) @ jnp.linalg.inv(onto_left)
        core = svd.left.T @ right
        logs, power = svd.log_values, 1 - 2 / self.depth
        largest = jnp.maximum(logs[:, None], logs[None, :])
        share = jnp.exp(logs[None, :] - largest), jnp.exp(logs[:, None] - largest)
        ratio = share[0] * share[1]
        scaled = core * jnp.exp(power * largest) * _series(ratio, self.depth)
        scaled = scaled / (1 + ratio**2)
        outside = jnp.exp(power * logs)[None, :]
        up = svd.left @ (scaled * share[0]) + (right - svd.left @ core) * outside
        down = svd.right @ (scaled * share[1]).T + (left - svd.right @ core.T) * outside
        return LowRank(up @ onto_left, jnp.zeros_like(logs), down @ onto_right)

    def inner(
        self,
        point: AbstractLinearNetwork,
        u: AbstractLinearNetwork,
        v: AbstractLinearNetwork,
    ) -> Scalar:
        """$g_W(Z_1, Z_2)$; the part of either that is not tangent counts for 0."""
        self._check(point)
        if isinstance(point, LinearMap):
            assert isinstance(u, LinearMap) and isinstance(v, LinearMap)
            dual = balanced_inverse(point.weight, u.weight, self.depth, rank=self.rank)
            return jnp.sum(dual * v.weight)
        assert isinstance(point, LowRank)
        svd = point.canonical()
        logs = svd.log_values
        largest = jnp.maximum(logs[:, None], logs[None, :])
        ratio = jnp.exp(-jnp.abs(logs[:, None] - logs[None, :]))
        weights = jnp.exp(2 * largest / self.depth) / _series(ratio, self.depth)
        parts = [self._parts(point, svd, tangent, largest) for tangent in (u, v)]
        root = jnp.exp(2 * logs / self.depth)
        return sum(
            (
                jnp.sum(parts[0][side] * parts[1][side] * root[None, :])
                for side in (1, 2)
            ),
            start=jnp.sum(parts[0][0] * parts[1][0] * weights),
        )

    def chart(self, point: AbstractLinearNetwork):
        r"""$(U + U_\perp a)(1 + c)\,D\,(V + V_\perp b)^\top$ as a function of $a, b,
        c$."""
        self._check(point)
        if isinstance(point, LinearMap):
            svd = LowRank(*_truncated(point.weight, self.rank))
        else:
            assert isinstance(point, LowRank)
            svd = point.canonical()
        k = self.rank
        beyond = [
            jnp.linalg.qr(side, mode="complete")[0][:, k:]
            for side in (svd.left, svd.right)
        ]
        sizes = [beyond[0].shape[1] * k, beyond[1].shape[1] * k, k * k]

        def rebuild(step: Float[Array, " dim"]) -> AbstractLinearNetwork:
            a, b, c = jnp.split(step, np.cumsum(sizes)[:-1])
            left = svd.left + beyond[0] @ a.reshape(-1, k)
            moved = LowRank(
                left + left @ c.reshape(k, k),
                svd.log_values,
                svd.right + beyond[1] @ b.reshape(-1, k),
            )
            if isinstance(point, LinearMap):
                return LinearMap(moved.matrix())
            return moved

        return rebuild, sum(sizes)

    def defect(self, point: AbstractLinearNetwork) -> Scalar:
        """The distance of W from the matrices of rank at most k."""
        self._check(point)
        if isinstance(point, LinearMap):
            values = jnp.linalg.svd(point.weight, compute_uv=False)
            return jnp.sqrt(jnp.sum(values[self.rank :] ** 2))
        assert isinstance(point, LowRank)
        return jnp.zeros_like(point.log_values[0])

    def _parts(self, point, svd, tangent, largest):
        """A tangent's core over $\\max(s_a, s_b)$ and its two outer parts over $s$."""
        up = tangent.left @ jnp.linalg.inv(svd.left.T @ point.left)
        down = tangent.right @ jnp.linalg.inv(svd.right.T @ point.right)
        up_core, down_core = svd.left.T @ up, svd.right.T @ down
        logs = svd.log_values
        core = up_core * jnp.exp(logs[None, :] - largest)
        core = core + down_core.T * jnp.exp(logs[:, None] - largest)
        return core, up - svd.left @ up_core, down - svd.right @ down_core

    def _check(self, point):
        if isinstance(point, LowRank):
            if point.rank != self.rank:
                raise ValueError(
                    f"the point has rank {point.rank} but the manifold rank="
                    f"{self.rank}: they must agree"
                )
        elif not isinstance(point, LinearMap):
            raise ValueError(
                f"FixedRank has points LinearMap and LowRank, got "
                f"{type(point).__name__}: a DeepLinear network has flat geometry"
            )
        elif self.rank > min(point.weight.shape):
            least = min(point.weight.shape)
            raise ValueError(f"rank={self.rank} is larger than min(shape)={least}")


@checked_arguments
def balanced_operator(
    weight: Float[Array, "y x"],
    z: Float[Array, "y x"],
    depth: int,
    *,
    rank: int | None = None,
) -> Float[Array, "y x"]:
    r"""$\mathcal{A}_W(Z) = \sum_{j=1}^N (WW^\top)^{(N-j)/N} Z (W^\top W)^{(j-1)/N}$.

    Differentiable (once) wherever it is smooth, repeated singular values included.

    **Arguments:**

    - `rank`: W's rank where it is known: all singular values beyond it count as 0.
      By default those below rounding do. (Rounding to the power 2/N is no rounding:
      1e-17 becomes 4e-4 at depth 10.)

    **Raises:** `ValueError` for shapes that differ, a depth below 1, or a rank outside
    0..min(shape).

    *Reference:* Bah et al. 2020, equation (12).
    """
    _check_arguments(weight, z, depth, rank)
    return _apply(weight, z, depth, rank)


@checked_arguments
def balanced_inverse(
    weight: Float[Array, "y x"],
    z: Float[Array, "y x"],
    depth: int,
    *,
    rank: int | None = None,
) -> Float[Array, "y x"]:
    r"""$\mathcal{A}_W^{-1}$ of the tangent part of $Z$: the inverse of
    `balanced_operator` on $T_W M_k$, 0 on its orthogonal complement.

    **Raises:** as `balanced_operator`.

    *Reference:* Bah et al. 2020, Lemma 12.
    """
    _check_arguments(weight, z, depth, rank)
    left, values, right = _full_svd(weight, rank)
    weights = _weights(values, weight.shape, depth)
    tangent = _tangent(values, weight.shape)
    inverse = jnp.where(tangent, 1 / jnp.where(weights > 0, weights, 1), 0)
    return left @ (inverse * (left.T @ z @ right.T)) @ right


@checked_arguments
def tangent_projection(
    weight: Float[Array, "y x"], z: Float[Array, "y x"], rank: int
) -> Float[Array, "y x"]:
    r"""The orthogonal projection $Q_U Z + Z Q_V - Q_U Z Q_V$ on $T_W M_k$.

    **Raises:** as `balanced_operator`.
    """
    _check_arguments(weight, z, 1, rank)
    left, _, right = jnp.linalg.svd(weight, full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    up, across = left.T @ z, z @ right.T
    return left @ up + (across - left @ (up @ right.T)) @ right


@checked_arguments
def balanced_operator_factored(
    log_values: Float[Array, " rank"],
    left: Float[Array, "y rank"],
    right: Float[Array, "x rank"],
    z_right: Float[Array, "y rank"],
    z_left: Float[Array, "x rank"],
    depth: int,
) -> tuple[Float[Array, "rank rank"], Float[Array, "y rank"], Float[Array, "x rank"]]:
    r"""$\mathcal{A}_W(Z)$ at $W = U\,\mathrm{diag}(e^l)\,V^\top$ from $ZV$ and
    $Z^\top U$, in $O((d_x + d_y) k^2)$; for depth 1 the tangent part of $Z$.

    **Returns:** $M, L, R$ with $\mathcal{A}_W(Z) = U M V^\top + L V^\top + U R^\top$,
    $U^\top L = 0$ and $V^\top R = 0$.
    """
    _check_parts(log_values, depth, left=left, right=right)
    check_shape("z_right", z_right, left.shape)
    check_shape("z_left", z_left, right.shape)
    core = left.T @ z_right
    weights, outside = _factored_weights(log_values, depth)
    return (
        weights * core,
        (z_right - left @ core) * outside,
        (z_left - right @ core.T) * outside,
    )


@checked_arguments
def balanced_inverse_factored(
    log_values: Float[Array, " rank"],
    core: Float[Array, "rank rank"],
    left_part: Float[Array, "y rank"],
    right_part: Float[Array, "x rank"],
    depth: int,
) -> tuple[Float[Array, "rank rank"], Float[Array, "y rank"], Float[Array, "x rank"]]:
    r"""$\mathcal{A}_W^{-1}$ of the tangent $U M V^\top + L V^\top + U R^\top$, in the
    same form: the inverse of `balanced_operator_factored`, each entry to its own
    relative accuracy.
    """
    _check_parts(log_values, depth, left_part=left_part, right_part=right_part)
    check_shape("core", core, 2 * log_values.shape)
    weights, outside = _factored_weights(log_values, depth)
    return core / weights, left_part / outside, right_part / outside


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _apply(weight, z, depth, rank):
    left, values, right = _full_svd(weight, rank)
    weights = _weights(values, weight.shape, depth)
    return left @ (weights * (left.T @ z @ right.T)) @ right


@_apply.defjvp
def _apply_jvp(depth, rank, primals, tangents):
    """The powers of $WW^\\top$ and $W^\\top W$ by divided differences, which for equal
    singular values are derivatives: differentiating the singular vectors divides by
    their distance."""
    weight, z = primals
    dweight, dz = tangents
    left, values, right = _full_svd(weight, rank)
    rows, columns = (_padded(values, size) for size in weight.shape)
    z, dz, dw = (left.T @ m @ right.T for m in (z, dz, dweight))
    square = jnp.zeros(weight.shape, weight.dtype)
    square = square.at[jnp.diag_indices(values.size)].set(values)
    above = dw @ square.T + square @ dw.T
    below = dw.T @ square + square.T @ dw
    a, b = rows ** (2 / depth), columns ** (2 / depth)
    out = _weights(values, weight.shape, depth) * z
    tangent = _weights(values, weight.shape, depth) * dz
    for j in range(1, depth + 1):
        change = _divided(a, depth - j, depth) * above
        tangent = tangent + (change @ z) * b[None, :] ** (j - 1)
        change = _divided(b, j - 1, depth) * below
        tangent = tangent + a[:, None] ** (depth - j) * (z @ change)
    return left @ out @ right, left @ tangent @ right


def _divided(roots, power, depth):
    r"""$(x^m - y^m) / (x^N - y^N)$ for all pairs, without cancellation; 0 at 0, 0."""
    x, y = roots[:, None], roots[None, :]
    if power == 0:
        return jnp.zeros((roots.size, roots.size), roots.dtype)
    above = sum(x**i * y ** (power - 1 - i) for i in range(power))
    below = sum(x**i * y ** (depth - 1 - i) for i in range(depth))
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)


def _check_parts(log_values, depth, **parts):
    check_whole("depth", depth)
    check_shape("log_values", log_values, (max(1, len(log_values)),))
    for name, part in parts.items():
        check_shape(name, part, (max(1, len(part)), len(log_values)))


def _check_arguments(weight, z, depth, rank):
    shape = jnp.shape(weight)
    check_shape("weight", weight, tuple(max(1, side) for side in shape))
    check_shape("z", z, shape)
    check_whole("depth", depth)
    if rank is not None and not 0 <= rank <= min(shape):
        raise ValueError(f"rank={rank} must be from 0 to {min(shape)}, the lesser side")


def _full_svd(weight, rank):
    """All of U and V, with the singular values that count as zero set to 0."""
    left, values, right = jnp.linalg.svd(weight, full_matrices=True)
    if rank is None:
        noise = max(weight.shape) * jnp.finfo(values.dtype).eps * values[0]
        return left, jnp.where(values > noise, values, 0), right
    return left, values.at[rank:].set(0), right


def _truncated(weight, rank):
    left, values, right = jnp.linalg.svd(weight, full_matrices=False)
    return left[:, :rank], jnp.log(values[:rank]), right[:rank].T


def _padded(values, size):
    return jnp.zeros((size,), values.dtype).at[: values.size].set(values)


def _weights(values, shape, depth):
    """$K_{ab}$ for all rows and columns of the full singular basis."""
    rows = _padded(values, shape[0])[:, None] ** (2 / depth)
    columns = _padded(values, shape[1])[None, :] ** (2 / depth)
    # Integer powers, so that 0^0 is 1.
    return sum(rows ** (depth - j) * columns ** (j - 1) for j in range(1, depth + 1))


def _tangent(values, shape):
    rows, columns = (_padded(values, size) for size in shape)
    return (rows[:, None] > 0) | (columns[None, :] > 0)


def _factored_weights(log_values, depth):
    """$K_{ab}$ among the kept singular values, and between these and 0."""
    power = 2 - 2 / depth
    largest = jnp.maximum(log_values[:, None], log_values[None, :])
    ratio = jnp.exp(-jnp.abs(log_values[:, None] - log_values[None, :]))
    weights = jnp.exp(power * largest) * _series(ratio, depth)
    return weights, jnp.exp(power * log_values)[None, :]


def _series(ratio, depth):
    r"""$K_{ab}$ over $\max(s_a, s_b)^{2 - 2/N}$, from the ratio of the smaller."""
    root = ratio ** (2 / depth)
    return sum(
        (root ** (j - 1) for j in range(2, depth + 1)), start=jnp.ones_like(root)
    )
