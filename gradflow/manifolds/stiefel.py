r"""Orthonormal frames: the geometry of Oja's flow.

| on paper | in code |
|---|---|
| $V$, $d$ by $r$, $V^\top V = 1$ | the one leaf of a point, the frame |
| $V_\perp$ with $[V, V_\perp]$ orthogonal | `complement` |
| $\mathrm{sym}(A) = \frac12 (A + A^\top)$ | `_sym` |

*Reference:* A. Edelman, T. Arias, S. Smith, *The geometry of algorithms with
orthogonality constraints* (1998); P.-A. Absil, R. Mahony, R. Sepulchre, *Optimization
algorithms on matrix manifolds* (2008), sections 3.5 and 4.1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..types import P, Scalar
from .base import AbstractManifold


class Stiefel(AbstractManifold[P]):
    r"""Frames $V$ with $V^\top V = 1$ and the metric of the space around them,
    $g(\xi, \eta) = \mathrm{tr}\,\xi^\top \eta$.

    A point is anything with one leaf, the frame, such as `models.TiedAutoencoder`. With
    `SquaredLoss` of an autoencoder the gradient flow is Oja's, $\dot V = (1 - VV^\top)
    C V$. The flow conserves $V^\top V$ and does not restore it: a run leaves the
    manifold by its solver's errors, which `defect` shows.

    **Raises:** each method raises `ValueError` for a point that is not one matrix with
    at least as many rows as columns.
    """

    def gradient(self, point: P, differential: P) -> P:
        r"""$D - V\,\mathrm{sym}(V^\top D)$, the orthogonal projection of the Euclidean
        derivative $D$ on the tangents."""
        _frame(point)
        return jax.tree.map(
            lambda frame, slope: slope - frame @ _sym(frame.T @ slope),
            point,
            differential,
        )

    def inner(self, point: P, u: P, v: P) -> Scalar:
        _frame(point)
        return jnp.sum(_frame(u) * _frame(v))

    def chart(self, point: P) -> tuple[Callable[[Float[Array, " dim"]], P], int]:
        r"""The $Q$ factor of $V + \xi$ for the tangent $\xi = V \Omega + V_\perp K$.

        Its coordinates are the entries of $\Omega$ (skew) and $K$, $rd - r(r+1)/2$ in
        all, orthonormal at 0.

        Since $(V + \xi)^\top (V + \xi) = 1 + \xi^\top \xi$ this is smooth everywhere.
        """
        frame, structure = _frame(point), jax.tree.structure(point)
        height, rank = frame.shape
        complement = jnp.linalg.qr(frame, mode="complete")[0][:, rank:]
        above = np.triu_indices(rank, 1)
        skews = len(above[0])

        def place(step: Float[Array, " dim"]) -> P:
            # An entry of a skew matrix appears twice: sqrt(2) keeps lengths.
            entries = step[:skews] / np.sqrt(2)
            skew = jnp.zeros((rank, rank), step.dtype).at[above].set(entries)
            normal = step[skews:].reshape(height - rank, rank)
            moved = frame + frame @ (skew - skew.T) + complement @ normal
            q, r = jnp.linalg.qr(moved)
            # Of the QR factorizations the one near V: positive diagonal.
            q = q * jnp.sign(jnp.diagonal(r))[None, :]
            return jax.tree.unflatten(structure, [q])

        return place, skews + (height - rank) * rank

    def defect(self, point: P) -> Scalar:
        r"""$\|V^\top V - 1\|_F$."""
        frame = _frame(point)
        gram = frame.T @ frame
        return jnp.linalg.norm(gram - jnp.eye(len(gram), dtype=gram.dtype))


def _sym(matrix):
    return 0.5 * (matrix + matrix.T)


def _frame(point):
    leaves = jax.tree.leaves(point)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if len(leaves) != 1 or len(shapes[0]) != 2 or shapes[0][0] < shapes[0][1]:
        raise ValueError(
            f"a point of Stiefel is one matrix with at least as many rows as columns, "
            f"got shapes {shapes}"
        )
    return leaves[0]
